"""The translation of the two CUDA constructs that are not C++."""

from tests.cuda_on_cpu.translate import translate


def test_launches():
    assert translate("k<<<1, n>>>(x);") == "cuda_on_cpu::launch(k, 1, n)(x);"
    assert translate("if (a) f::k<T, w<T>, true><<<dim3(1), b, 0, s>>>(x);\nk<<<1, 2>>>();") == (
        "if (a) cuda_on_cpu::launch(f::k<T, w<T>, true>, dim3(1), b, 0, s)(x);\ncuda_on_cpu::launch(k, 1, 2)();"
    )


def test_dynamic_shared_memory():
    assert translate("extern __shared__ float s[];") == "auto* s = static_cast<float*>(cuda_on_cpu::dynamic_shared());"
    assert "auto* s" in translate("extern __shared__ __align__(16) unsigned char s[];")


def test_lines_stay():
    source = "a\nextern __shared__ int s[];\nk<<<1,\n 2>>>(x);\n"
    assert translate(source).count("\n") == source.count("\n")
