"""Bytes kept for backward, to the byte; and the peak of a step."""

import mmap
import threading
import time
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sidestep.measure.memory import Kept, format_bytes, mib, peak_memory, saved_bytes

FLOAT = 4


class Mlp(nn.Module):
    """(batch, 8) -> (batch, 2); keeps the inputs of both maps, 8 and 16 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.down = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def only_row(rows: list[Kept]) -> Kept:
    assert len(rows) == 1
    return rows[0]


def test_a_linear_map_keeps_its_input_and_not_its_weight():
    model = nn.Linear(8, 3)
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8)).sum()
    row = only_row(kept.rows)
    assert kept.total == 4 * 8 * FLOAT
    assert (row.shape, row.dtype, row.bytes, row.storage_bytes) == ((4, 8), torch.float32, 128, 128)
    assert not row.pinned


def test_the_weight_saved_for_the_inputs_gradient_is_not_counted():
    model = nn.Linear(8, 3)
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8, requires_grad=True)).sum()
    assert kept.total == 4 * 8 * FLOAT


def test_buffers_are_not_counted():
    model = nn.BatchNorm1d(8).eval()
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8))
    assert kept.total == 4 * 8 * FLOAT


def test_a_tensor_saved_by_two_operations_counts_once_and_for_the_first():
    with saved_bytes(model := Mlp()) as kept:
        model(torch.randn(4, 8)).sum()
    assert kept.total == 4 * 8 * FLOAT + 4 * 16 * FLOAT
    assert [(row.module, row.bytes, row.saves) for row in kept.rows] == [("act", 256, 2), ("up", 128, 1)]


def test_nothing_is_kept_without_a_graph():
    with saved_bytes(model := Mlp()) as kept, torch.no_grad():
        model(torch.randn(4, 8))
    assert (kept.total, kept.rows, kept.warnings) == (0, [], [])


def test_bfloat16_counts_two_bytes_an_element():
    model = nn.Linear(8, 3, dtype=torch.bfloat16)
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8, dtype=torch.bfloat16))
    assert (kept.total, kept.rows[0].dtype) == (4 * 8 * 2, torch.bfloat16)


def test_a_slice_counts_with_the_whole_storage_it_pins_and_is_warned_of():
    model = nn.Sequential(nn.Linear(8, 3))
    hidden = torch.randn(4, 5, 8)
    with saved_bytes(model) as kept:
        model(hidden[:, 0])
    row = only_row(kept.rows)
    assert (row.bytes, row.storage_bytes, row.counted, row.pinned) == (128, 640, 640, True)
    assert kept.total == 640
    assert kept.warnings == [
        "0: a slice (128 B) of shape (4, 8) pins its storage of 0.00 MiB: copy the row",
    ]


def test_a_copied_row_pins_nothing():
    model = nn.Linear(8, 3)
    with saved_bytes(model) as kept:
        model(torch.randn(4, 5, 8)[:, 0].clone())
    assert (kept.total, kept.warnings) == (128, [])


def test_a_slice_is_not_pinned_if_the_rest_is_saved_too():
    model = nn.Linear(8, 3)
    hidden = torch.randn(4, 5, 8)
    with saved_bytes(model) as kept:
        model(hidden[:, 0])
        model(hidden)
    assert kept.total == 640
    assert [(row.bytes, row.counted) for row in kept.rows] == [(640, 0), (128, 640)]
    assert not any(row.pinned for row in kept.rows)
    assert kept.warnings == []


def test_views_of_one_storage_count_once():
    weight = torch.randn(16, requires_grad=True)
    base = torch.randn(2, 16)
    with saved_bytes(nn.Identity()) as kept:
        (base[0] * weight).sum() + (base[1] * weight).sum() + (base.flatten().view(2, 16) * weight).sum()
    assert kept.total == 2 * 16 * FLOAT
    assert sum(row.counted for row in kept.rows) == kept.total


def test_an_expanded_row_is_no_more_than_its_storage():
    weight = torch.randn(6, 4, requires_grad=True)
    with saved_bytes(nn.Identity()) as kept:
        torch.randn(4).expand(6, 4) * weight
    row = only_row(kept.rows)
    assert (row.bytes, row.storage_bytes, row.pinned) == (96, 16, False)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.mean(dim=0))
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_a_custom_function_keeps_what_it_saves():
    with saved_bytes(nn.Identity()) as kept:
        Square.apply(torch.randn(4, 8, requires_grad=True))
    assert [row.shape for row in kept.rows] == [(4, 8), (8,)]
    assert kept.total == 4 * 8 * FLOAT + 8 * FLOAT


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpointed_block_keeps_its_input_only():
    model, x = Checkpointed(Mlp()), torch.randn(4, 8)
    with saved_bytes(model) as kept:
        loss = model(x).square().sum()
    assert [(row.module, row.shape) for row in kept.rows] == [("", (4, 8)), ("", (4, 2))]
    loss.backward()
    recomputed = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.block(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(recomputed, model.parameters(), strict=True))


def test_backward_inside_the_block_leaves_the_names_right():
    model = Checkpointed(Mlp())
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8)).sum().backward()
        torch.randn(32, requires_grad=True).exp()
    assert {row.module for row in kept.rows} == {""}


def test_a_freed_storage_is_not_mixed_up_with_the_next_one_at_its_address():
    size, times = 10_000_000, 4  # large enough for the system to give the same pages back
    x = torch.randn(size, requires_grad=True)
    addresses = set()
    with saved_bytes(nn.Identity()) as kept:
        for _ in range(times):
            loss = x.exp()
            addresses.add(loss.data_ptr())
            del loss
    assert len(addresses) < times, "no address was used again: the test shows nothing"
    assert kept.total == times * size * FLOAT


def test_the_record_keeps_no_storage_alive():
    x = torch.randn(64, requires_grad=True)
    with saved_bytes(nn.Identity()) as kept:
        y = x.exp()
        y.sin()
        storage = weakref.ref(y.untyped_storage())
        del y
        freed = storage() is None
    assert freed
    assert kept.total == 64 * FLOAT


def test_gradients_are_untouched():
    model, x = Mlp(), torch.randn(4, 8)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with saved_bytes(model):
        loss = model(x).square().sum()
    measured = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_second_derivatives_are_untouched():
    def second() -> Tensor:
        x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad((x.exp() * x.tanh()).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with saved_bytes(nn.Identity()):
        measured = second()
    assert torch.equal(measured, second())


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_names_stay_right_after_a_forward_that_raises():
    model = nn.ModuleDict({"bad": nn.Sequential(nn.Linear(8, 8), Fails()), "good": nn.Linear(8, 3)})
    with saved_bytes(model) as kept:
        with pytest.raises(ArithmeticError):
            model["bad"](torch.randn(4, 8))
        model["good"](torch.randn(4, 8))
        torch.randn(64, requires_grad=True).exp()
    assert sorted(row.module for row in kept.rows) == ["", "bad.0", "good"]


def test_another_hook_that_raises_does_not_shift_the_names():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))

    def refuse(module: nn.Module, args: object) -> None:
        raise ArithmeticError

    with saved_bytes(model) as kept:
        handle = model[0].register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(ArithmeticError):
            model(torch.randn(4, 8))
        handle.remove()
        model(torch.randn(4, 8))
    assert [row.module for row in kept.rows] == ["0.0"]


def test_no_hook_is_left_behind_even_if_the_block_raises():
    model = nn.Sequential(Fails())
    with saved_bytes(model):
        assert hooks(model) == 4
    with pytest.raises(ArithmeticError), saved_bytes(model):
        model(torch.randn(1))
    assert hooks(model) == 0
    with saved_bytes(model) as kept:
        pass
    torch.randn(3, requires_grad=True).exp()
    assert kept.total == 0


def test_what_a_standing_hook_saves_counts_for_its_module():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    scale = torch.randn(8, requires_grad=True)
    model[1].register_forward_hook(lambda module, args, output: output * scale)
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8))
    assert only_row(kept.rows).module == "1"


def test_a_module_with_two_names_goes_by_the_first():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    with saved_bytes(model) as kept:
        model["second"](torch.randn(4, 8))
    assert only_row(kept.rows).module == "first"


def test_by_module_sums_to_the_total_at_every_depth():
    model = nn.Sequential(Mlp(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with saved_bytes(model) as kept:
        model(torch.randn(4, 8))
    assert kept.by_module() == {"0.act": 256, "0.up": 128, "1.0": 32, "1.1": 32}
    assert kept.by_module(1) == {"0": 384, "1": 64}
    assert kept.by_module(0) == {"": 448} == {"": kept.total}
    with pytest.raises(ValueError, match="depth=-1: give 0 or more"):
        kept.by_module(-1)


def test_the_table_names_the_largest_first_and_the_total():
    with saved_bytes(model := Mlp()) as kept:
        model(torch.randn(4, 8))
    assert str(kept).splitlines() == [
        "kept   of storage  dtype    shape    module",
        "256 B  256 B       float32  (4, 16)  act",
        "128 B  128 B       float32  (4, 8)   up",
        "total 384 B in 2 storages",
    ]


def test_the_table_is_cut_after_twenty_rows():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(23)])
    with saved_bytes(model) as kept:
        model(torch.randn(2, 4))
    assert "... and 3 smaller ones" in str(kept)
    assert "total 736 B in 23 storages" in str(kept)


def test_a_sparse_tensor_is_named_and_not_counted():
    matrix = torch.eye(4).to_sparse()
    with saved_bytes(nn.Identity()) as kept:
        torch.sparse.mm(matrix, torch.randn(4, 3, requires_grad=True))
    assert kept.total == 0
    assert kept.warnings == ["the model itself keeps a torch.sparse_coo tensor, which is not counted"]


def test_a_record_is_used_once():
    record = saved_bytes(nn.Identity())
    with record:
        pass
    with pytest.raises(RuntimeError, match="call saved_bytes"):
        record.__enter__()


def test_units():
    assert mib(3 * 2**19) == 1.5
    assert [format_bytes(n) for n in (0, 1023, 1536, 222 * 2**20, 5 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "222.0 MiB",
        "5.0 GiB",
    ]


N = 250_000  # elements: 1 MB


def test_the_peak_on_the_cpu_is_what_is_alive_at_once():
    def step() -> None:
        x = torch.empty(N)
        y = torch.neg(x)
        del x
        z = torch.neg(y)
        del y
        torch.neg(z)

    assert peak_memory(step).allocated == 2 * N * FLOAT


def test_memory_from_before_the_step_neither_raises_nor_lowers_the_peak():
    # twice: an earlier profile knows the blocks of the first call, which must change nothing
    for _ in range(2):
        old = [torch.ones(4 * N)]

        def step(old: list[Tensor] = old) -> None:
            old.pop()
            old.append(torch.zeros(N))

        assert peak_memory(step).allocated == N * FLOAT


def test_the_peak_of_a_training_step_holds_what_backward_needs():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
    x = torch.randn(256, 64)
    with saved_bytes(model) as kept:
        model(x)
    saved = kept.total - x.nbytes  # the input is there before the step
    assert saved == 4 * x.nbytes

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    peak = peak_memory(step)
    assert saved < peak.allocated < 3 * saved
    assert peak_memory(step) == peak or peak_memory(step).allocated == peak.allocated


def test_the_resident_peak_sees_memory_that_pytorch_did_not_allocate():
    size = 256 * 2**20

    def step() -> None:
        # Mapped afresh: a long test process may serve an ordinary allocation from pages that are resident already.
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.3)  # the sampler needs the interpreter lock

    peak = peak_memory(step)
    assert peak.allocated == 0
    assert peak.resident is not None
    assert peak.resident > size // 2


def test_a_step_that_raises_leaves_no_thread_and_no_profiler():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert "sidestep-resident" not in [thread.name for thread in threading.enumerate()]
    assert peak_memory(lambda: torch.empty(N)).allocated == N * FLOAT


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device='meta': peak memory can be measured on 'cpu' and 'cuda'"):
        peak_memory(lambda: None, "meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="CUDA is not available: measure on 'cpu'"):
        peak_memory(lambda: None, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_on_cuda_is_above_the_start():
    old = torch.empty(N, device="cuda")

    def step() -> None:
        torch.neg(torch.neg(old))

    # blocks are rounded up to 512 bytes
    assert 2 * N * FLOAT <= peak_memory(step, "cuda").allocated <= 2 * (N * FLOAT + 512)
