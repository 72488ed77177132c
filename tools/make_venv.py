"""Makes the virtual environment of this checkout, with torch in it: `python3 make_venv.py DIR`.

- A Python whose torch already works on this machine's GPU keeps it: the environment sees the
  packages of that Python.
- A machine without a GPU gets torch's CPU build, a tenth of the other's size, where there is one.
- DIR/constraints.txt pins torch and triton for all that pip installs there later.

Standard library only, and no syntax newer than the versions it has to turn away.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
CONSTRAINTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "constraints.txt")
# Exits 0, and prints pins, where torch is new enough and finds a GPU.
GPU_PINS = """
import importlib.metadata, sys, torch
if not (torch.__version__ >= "2.11" and torch.cuda.is_available()):
    sys.exit(1)
for name in ("torch", "triton"):
    try:
        print(name + "==" + importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def main(directory):
    if sys.version_info < OLDEST:
        sys.exit(
            "minigen needs Python 3.11 or newer, and {} is Python {}.{}: "
            "name a newer one with PYTHON=...".format(sys.executable, *sys.version_info[:2])
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            f"minigen needs Python's venv, which {sys.executable} lacks: install it "
            "(on Debian and Ubuntu: apt install python3-venv) or name another with PYTHON=..."
        )
    pins = gpu_pins(sys.executable)
    python = make(directory, system_site_packages=bool(pins))
    # If this Python is itself a virtual environment, its packages are not what the new one sees.
    if pins and gpu_pins(python) != pins:
        pins, python = "", make(directory, system_site_packages=False)
    if not pins:
        with open(CONSTRAINTS) as file:
            pins = file.read()
        if sys.platform == "linux" and not has_nvidia_gpu():
            install_cpu_torch(python, pins)
    with open(os.path.join(directory, "constraints.txt"), "w") as file:
        file.write(pins)


def gpu_pins(python):
    """`torch==...` and `triton==...` as this Python has them; empty if they find no GPU."""
    found = subprocess.run([python, "-c", GPU_PINS], capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else ""


def make(directory, system_site_packages):
    options = ["--system-site-packages"] if system_site_packages else []
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, directory], check=True)
    return os.path.join(directory, "bin", "python")


def has_nvidia_gpu():
    command = shutil.which("nvidia-smi")
    return (
        command is not None and subprocess.run([command, "-L"], capture_output=True).returncode == 0
    )


def install_cpu_torch(python, pins):
    """Looks where pip is set to look, then in torch's own index; else leaves it to what follows."""
    pin = next(line for line in pins.splitlines() if line.startswith("torch==")) + "+cpu"
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", pin]
    # Without a network the second try must end soon: no long timeouts.
    own_index = os.environ.get("TORCH_CPU_INDEX")
    tries = [[], ["--extra-index-url", own_index, "--timeout", "20", "--retries", "2"]]
    for options in tries if own_index else tries[:1]:
        if subprocess.run(command + options, stderr=subprocess.DEVNULL).returncode == 0:
            return
    print(f"There is no {pin} to be had: pip takes the build that it finds.")


if __name__ == "__main__":
    main(sys.argv[1])
