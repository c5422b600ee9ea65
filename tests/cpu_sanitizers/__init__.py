"""The C++ CPU kernels with AddressSanitizer + UBSan and with ThreadSanitizer, driven by the ops' tests."""
