"""How the C++ extension is built; a copy of this folder goes into the wheel beside the sources, so that it can be built
later."""
