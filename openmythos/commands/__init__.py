"""The command line, one command a file: `main(arguments)` each, and a first line that the list of commands shows."""

COMMANDS = ("train", "prepare", "eval", "generate", "fit-halting", "plot", "sizes", "lab")
