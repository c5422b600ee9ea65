"""The C++ CPU kernels under AddressSanitizer + UBSan and under ThreadSanitizer, driven by the tests of every described
op."""
