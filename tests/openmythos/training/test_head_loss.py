import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.training.losses import token_losses

B, T, D, V = 2, 12, 16, 40


class Wrapped(nn.Module):
    """A head that is called: its logits are computed again in the backward pass."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


def inputs(dtype=torch.float64, ignored=()):
    torch.manual_seed(3)
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    head = nn.Linear(D, V, bias=False).to(dtype)
    targets = torch.randint(V, (B, T))
    targets.view(-1)[list(ignored)] = -100
    weight = torch.rand(B, T, dtype=dtype, requires_grad=True)
    return hidden, head, targets, weight


def gradients(results, *of):
    return torch.autograd.grad(3 * results[0], of)  # 3: what a scaler or accumulated batches multiply by


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_weight", [0, 0.5])
@pytest.mark.parametrize("chunk", [5, 24, 100])
def test_it_is_what_the_called_head_gives(chunk, z_weight, weighted):
    hidden, head, targets, weight = inputs(ignored=(0, 7, 23))
    of = (hidden, head.weight, *([weight] if weighted else []))
    found = token_losses(hidden, head, targets, chunk, z_weight, weight if weighted else None)
    wanted = token_losses(hidden, Wrapped(head), targets, chunk, z_weight, weight if weighted else None)
    for a, b in zip(found[: 3 if z_weight else 2], wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(gradients(found, *of), gradients(wanted, *of)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Products(TorchDispatchMode):
    """Counts matrix products, in products of all rows with the head's weight. PyTorch's own counter hooks modules."""

    done = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.done += args[0].numel() * args[1].shape[1] / (B * T * D * V)
        return func(*args, **(kwargs or {}))


def products(head):
    hidden, own, targets, _ = inputs()
    with Products() as counter:
        token_losses(hidden, head(own), targets, 5)[0].backward()
    return round(counter.done, 6)


def test_it_takes_three_products_where_a_called_head_takes_four():
    assert products(lambda head: head) == 3
    assert products(Wrapped) == 4


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_no_product_for_a_gradient_that_nobody_wants(frozen):
    hidden, head, targets, _ = inputs()
    (hidden if frozen == "hidden" else head.weight).requires_grad_(False)
    with Products() as counter:
        token_losses(hidden, head, targets, 5)[0].backward()
    assert round(counter.done, 6) == 2


def test_without_gradients_it_takes_one_product():
    hidden, head, targets, _ = inputs()
    with Products() as counter, torch.no_grad():
        token_losses(hidden, head, targets, 5)
    assert round(counter.done, 6) == 1


@pytest.mark.parametrize("watched", ["hook", "hook on every module", "forward"])
def test_a_watched_head_is_called(watched):
    hidden, head, targets, _ = inputs()
    calls = []
    if watched == "forward":
        head.forward = lambda x: calls.append(1) or nn.Linear.forward(head, x)
        token_losses(hidden, head, targets, 12)
    else:
        register = head.register_forward_hook if watched == "hook" else nn.modules.module.register_module_forward_hook
        handle = register(lambda *_: calls.append(1))
        token_losses(hidden, head, targets, 12)
        handle.remove()
    assert len(calls) == 2


def test_bfloat16_gradients_are_added_up_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 256, D), nn.Linear(D, V, bias=False)
    targets = torch.randint(V, (4, 256))

    def error(wrap):
        exact, narrow = nn.Linear(D, V, bias=False).double(), nn.Linear(D, V, bias=False).bfloat16()
        for other in (exact, narrow):
            with torch.no_grad():
                other.weight.copy_(head.weight.bfloat16())
        token_losses(hidden.bfloat16().double(), exact, targets, 4)[0].backward()
        token_losses(hidden.bfloat16(), wrap(narrow), targets, 4)[0].backward()
        return (narrow.weight.grad.double() - exact.weight.grad).abs().mean()

    assert error(lambda head: head) < 0.5 * error(Wrapped)


def test_autocast_products_are_bfloat16_and_gradients_float32():
    hidden, head, targets, _ = inputs(torch.float32)
    results = []
    for one in (head, Wrapped(head)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_losses(hidden, one, targets, 5)[0]
        results.append((loss, *torch.autograd.grad(loss, (hidden, head.weight))))
    assert [x.dtype for x in results[0]] == [torch.float32] * 3
    torch.testing.assert_close(*results, rtol=0, atol=2e-3)


def test_its_second_derivative_is_an_error_and_a_second_backward_is_not():
    hidden, head, targets, _ = inputs()
    loss = token_losses(hidden, head, targets, 5)[0]
    once, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        torch.autograd.grad(loss, hidden, create_graph=True)
