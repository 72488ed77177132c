"""The data of the bundled chat model: cleaned sets, and conversations of our own.

`python -m tools.chat_recipe --data DIR --output DIR` writes it; `weights/minichat-11m/README.md`
tells the whole recipe.
"""
