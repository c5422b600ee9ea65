"""Builds the C++ extension. A copy of this folder is in the wheel beside the sources, so that it can be built later."""
