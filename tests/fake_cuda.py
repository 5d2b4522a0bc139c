"""Fake CUDA tensors, and a record of what the code under test does with them.

CUDA tensors are fake (shape, dtype, device, no memory: torch's FakeTensorMode), CPU tensors are
real; a copy from CUDA to the CPU gives zeros. torch.cuda's streams and graphs are stand-ins: code
under capture runs once, eagerly, and a replay does nothing. So this shows which device, dtype and
host traffic each operation has, and which calls capture or replay. It cannot show that a capture
succeeds, which kernels run, that streams are ordered, any number, speed or memory use.

Needs fake_cuda.cpp, compiled and loaded before torch; see test_fake_cuda.py.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda")
aten = torch.ops.aten
ATTENTION = F.scaled_dot_product_attention
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution}
PROBABILITIES = {aten._log_softmax, aten.cumsum}


class Caught(AssertionError):
    """The code under test did what the CUDA path must not do."""


# --- the watcher and the stand-ins ----------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Run CUDA operations on fake tensors and CPU operations for real, and count what matters.

    counts: sends and reads (copies between host and device), mixes (other operations on tensors of
    both), captures, replays; bf16_casts. products and probabilities: dtypes of matrix products, and
    of log-softmax and cumulative sums.
    """

    def __init__(self, fake_mode):
        super().__init__()
        self.fake_mode = fake_mode
        self.capturing = self.in_attention = False
        self.reset()

    def reset(self):
        self.counts, self.bf16_casts = Counter(), 0
        self.products, self.probabilities = set(), set()

    def note(self, kind, func):
        self.counts[kind] += 1
        if self.capturing:
            raise Caught(f"{kind} while capturing: {func}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # of a fake tensor: half of all calls
            return args[0].fake_device
        kwargs, packet = kwargs or {}, func.overloadpacket
        tensors, to = list(leaves((args, kwargs))), kwargs.get("device")
        host = [t for t in tensors if not isinstance(t, FakeTensor)]  # all fake ones are on CUDA
        if len(host) == len(tensors) and (to is None or to.type == "cpu"):
            if self.capturing and host:
                self.note("host operations", func)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            self.note("reads", func)
            return True if args[0].dtype == torch.bool else 0
        if packet is aten._to_copy and to is not None and to.type == "cpu":
            self.note("reads", func)
            shape, dtype = args[0].shape, kwargs.get("dtype") or args[0].dtype
            with unset_fake_temporarily():
                return torch.zeros(shape, dtype=dtype)
        if host:
            self.note("sends" if packet in (aten._to_copy, aten.copy_) else "mixes", func)
            to_fake = lambda t: t if isinstance(t, FakeTensor) else self.fake_mode.from_tensor(t)
            args, kwargs = tree_map_only(torch.Tensor, to_fake, (args, kwargs))
        result = func(*args, **kwargs)
        if packet in PRODUCTS and not self.in_attention:
            self.products.add(result.dtype)
        if packet in PROBABILITIES:
            self.probabilities.add(result.dtype)
        if packet is aten._to_copy and result.dtype == torch.bfloat16:
            self.bf16_casts += 1
        return result

    def attention(self, query, *args):
        """Stand in for scaled_dot_product_attention, whose kernels this build of torch lacks: it
        falls back on float32 products, which are not counted; the type of the query is."""
        self.products.add(query.dtype)
        self.in_attention = True
        try:
            return ATTENTION(query, *args)
        finally:
            self.in_attention = False


def leaves(value):
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from leaves(x)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))


class Stream:
    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def fake_cuda(capability=(9, 0)):
    """Replace torch.cuda by stand-ins and fake tensors. Yields the Watch."""
    fake_mode = FakeTensorMode()
    watch = Watch(fake_mode)

    class Graph:
        def replay(self):
            watch.counts["replays"] += 1

    @contextlib.contextmanager
    def capture(graph):
        watch.counts["captures"] += 1
        watch.capturing = True
        try:
            yield
        finally:
            watch.capturing = False

    stand_ins = dict(
        is_available=lambda: True, is_bf16_supported=lambda *_, **__: True,
        get_device_capability=lambda *_: capability, current_stream=Stream, Stream=Stream,
        stream=lambda _: contextlib.nullcontext(), CUDAGraph=Graph, graph=capture,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_mode)  # before CUDA seems available, or it would be initialised
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", watch.attention))
        # autocast would switch itself off
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available",
                                       lambda: False))  # fmt: skip
        # one copy on a real device; of a fake tensor one read per number
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))
        # autograd would start a thread per device, which has no modes
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield stack.enter_context(watch)


def to_cuda(module):
    """Move a module; Module.to cannot turn real parameters into fake ones."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(p.detach().to(CUDA), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = b.to(CUDA)
    return module
