"""The `looplm` command.

`main.main(["train", "--recipe", "text-small"])` runs a command and returns its exit status. A command is

* its flags, in `flags`;
* the checks that need no JAX, in `commands`, so that a wrong flag is reported at once;
* a module of its own name, imported only then, which does the work and prints what to run next.

Everything that a command does is available in Python from the other subpackages; nothing here is meant to be imported
by users.
"""
