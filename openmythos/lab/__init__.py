"""The laboratory: claims about looped models as experiments that anyone can run, and that can fail."""
