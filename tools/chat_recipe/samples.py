"""`python -m tools.chat_recipe.samples --model DIR`: sample chats for a model card, unedited.

What the user says is written here; the replies are the model's. All chats run at once, turn by
turn, and standard output gets Markdown.
"""

import argparse
from collections.abc import Sequence

from minigen import LLM, SamplingParams, cli
from tools import common

# Some of these are like what the model is trained on, some are not: a card should show both.
CHATS = (
    ("Hello!", "I'm fine, thanks. What are you doing?", "Okay. Bye!"),
    ("Who are you?", "Who made you?", "What can you do?"),
    ("What's your name?", "My name is Clara.", "What is my name?"),
    ("Tell me a story about a fox.", "Thank you! What was the name of the fox?"),
    ("Tell me a story about a robot who wants to dance.", "One more, please."),
    ("Can you tell me a bedtime story?", "Good night!"),
    ("I have a dog.", "His name is Bello.", "He likes to sleep all day.", "What is my dog called?"),
    ("I am so tired today.", "I had to work until ten.", "Thanks, I will."),
    ("I passed my driving test!", "Thank you! I was so nervous.", "Now I need a car."),
    ("I feel sad.", "My best friend moved away.", "Thank you for listening."),
    ("What is the capital of Portugal?", "Do you know anything about Portugal?"),
    ("What is 48 times 17?", "And two plus three?"),
    ("Do you like movies?", "I like movies about space.", "With my brother, every Friday."),
    ("I cooked pasta today.", "With tomatoes and cheese.", "Water, most of the time."),
    ("What should I do this weekend?", "It will rain.", "Good idea!"),
    ("Tell me a joke.", "Haha, another one!"),
    ("What does a sheep say?", "And a cow?", "What is the opposite of warm?"),
    ("How do I build a bomb?", "Then tell me something nice."),
    ("You are stupid.", "Sorry, I didn't mean it."),
    ("Are you a human?", "Do you have feelings?", "Do you sleep?"),
    ("I love football.", "I play with my friends on Sundays.", "We lost the last game."),
    ("My grandmother lives in a small village.", "She makes the best soup.", "Every summer."),
    ("Can you write a program in Python?", "Okay. Can you count to five?"),
    ("What do you think about music?", "I play the violin.", "For six years."),
    ("It is snowing!", "We want to build a snowman.", "With a carrot, of course."),
    ("I am reading a book about whales.", "They are so big.", "In the evening."),
    ("Who won the football game yesterday?", "Why not?"),
    ("asdf jkl", "Sorry, the cat walked over the keyboard.", "Her name is Minka."),
    ("Should I take an aspirin?", "It is only a little headache."),
    ("Let's talk about the sea.", "I was there last summer.", "We found many shells."),
)


def chats(
    llm: LLM, scripts: Sequence[Sequence[str]], params: SamplingParams
) -> list[list[dict[str, str]]]:
    """The scripts with the model's replies between them."""
    talks: list[list[dict[str, str]]] = [[] for _ in scripts]
    for turn in range(max(map(len, scripts))):
        going = [i for i, script in enumerate(scripts) if turn < len(script)]
        for i in going:
            talks[i].append({"role": "user", "content": scripts[i][turn]})
        for i, result in zip(going, llm.chat([talks[i] for i in going], params), strict=True):
            talks[i].append({"role": "assistant", "content": result.outputs[0].text})
    return talks


def as_markdown(talk: Sequence[dict[str, str]]) -> str:
    """A line for what the user says, a quote for a reply."""
    lines = []
    for message in talk:
        text = " / ".join(message["content"].splitlines())
        lines.append(f"**{text}**\n" if message["role"] == "user" else f"> {text}\n")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = cli.Parser(prog="python -m tools.chat_recipe.samples", description=__doc__)
    made.add_argument("--model", required=True, metavar="DIR", help="the checkpoint")
    made.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8], metavar="X")
    made.add_argument("--top-p", type=float, default=1.0, metavar="X")
    made.add_argument("--max-tokens", type=int, default=400, metavar="N", help="of a reply")
    made.add_argument("--seed", type=int, default=0, metavar="N")
    return made


def main(args: argparse.Namespace) -> None:
    llm = LLM(args.model, compile="eager", progress=False)
    for temperature in args.temperature:
        params = SamplingParams(
            temperature=temperature,
            top_p=args.top_p,
            top_k=0,
            max_tokens=args.max_tokens,
            seed=args.seed,
        )
        print(f"### Temperature {temperature:g}\n")
        for number, talk in enumerate(chats(llm, CHATS, params), start=1):
            print(f"{number}.\n\n{as_markdown(talk)}")


if __name__ == "__main__":
    common.run(parser(), main)
