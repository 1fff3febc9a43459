"""
Predicts the memory that a script of this repository takes on a GPU, without a GPU:

$ python extras/memory.py train_llama.py config/llama_1b.py config/methods/galore.py \
      --budget=12GiB --world_size=4

The other arguments are the same as in a training run. The script itself runs, for two steps, on
fake CUDA tensors, which have shapes and no values, so your edits of the code count. A data set of
prepare.py does not have to exist; finetune.py needs its model's folder and its --data. --budget
also searches the largest batch_size that fits, over all processes, of which each has a GPU.

The prediction leaves out CUDA's context, workspaces of libraries and gaps of the allocator, for
which 1 GB of the budget stays free; and torch.compile, which lowers the peak. It needs g++.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import linecache
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIBRARY = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
const Device gpu(DeviceType::CUDA, 0);
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
extern "C" void set_guard() { static impl::DeviceGuardImplRegistrar _(gpu.type(), new Guard); }
namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, Hooks)
}
"""


def load_library():
    """Makes autograd accept fake CUDA tensors on a machine without a GPU. Comes before torch is
    imported, whose own hooks it replaces."""
    folder = Path(importlib.util.find_spec('torch').origin).parent
    with tempfile.NamedTemporaryFile(suffix='.so') as file:
        command = (f'g++ -std=c++20 -shared -fPIC -w -xc++ - -o {file.name} -I{folder}/include '
                   f'-L{folder}/lib -Wl,-rpath,{folder}/lib -lc10 -ltorch_cpu')
        subprocess.run(command.split(), input=LIBRARY.encode(), check=True)
        return ctypes.CDLL(file.name)


library = load_library() if 'torch' not in sys.modules else None

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import optimizer as hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import configurator
import lowrank

if library:
    library.set_guard()

# -----------------------------------------------------------------------------
# counting

WEIGHTS, STATE, GRADIENTS, REST = KINDS = (
    'weights', 'optimizer state', 'gradients', 'activations and temporaries')


class Watch(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are alive, by kind, and keeps their peak."""

    def __init__(self, script, fake):
        super().__init__()
        self.script, self.fake, self.device = script, fake, 'cuda'
        self.alive = {}  # a storage's address: [its kind, its bytes, a weak reference]
        self.now = Counter()  # bytes by kind
        self.peaks = []  # (bytes, bytes by kind, line): until step 1, of step 2, later
        self.peak = 0, {}, 0

    def next_phase(self):
        self.peaks.append(self.peak)
        self.peak = 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls this again with the rows of this process
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # a loss, or False: 'a weight is infinite', 'a signal came'
        out = function(*args, **kwargs or {})
        self.fake.fake_tensor_converter.tensor_memo.clear()  # it would keep tensors alive
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.device.type == self.device:
                self.note(x)
        if self.now.total() > self.peak[0]:
            # not this thread's frame, because a backward pass on a GPU has its own thread
            frame = sys._current_frames()[threading.main_thread().ident]
            while frame and frame.f_code.co_filename != self.script:
                frame = frame.f_back
            self.peak = self.now.total(), dict(self.now), frame.f_lineno if frame else 0
        return out

    def note(self, x):
        """Counts the storage of a tensor, which its views share."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = [REST, size, weakref.ref(storage, lambda _: self.forget(key))]
            self.now[REST] += size

    def name(self, x, kind):
        """Says what a tensor has turned out to be. It may be of an earlier script, or None."""
        x = x.to_local() if isinstance(x, DTensor) else x
        found = self.alive.get(x.untyped_storage()._cdata) if torch.is_tensor(x) else None
        if found:
            self.now[found[0]] -= found[1]
            self.now[kind] += found[1]
            found[0] = kind

    def forget(self, key):
        kind, size, _ = self.alive.pop(key)
        self.now[kind] -= size

    def before_step(self, optimizer, *_):
        for module in gc.get_objects():
            if issubclass(type(module), nn.Module):
                for name, x in module.named_buffers(recurse=False):
                    is_state = name in ('Q', 'velocity')  # GaLore's, an outer optimizer's
                    self.name(x, STATE if is_state else WEIGHTS)
                for p in module.parameters(recurse=False):
                    self.name(p, WEIGHTS)
                    self.name(p.grad, GRADIENTS)
                for x in getattr(module, 'ddp_buckets', ()):
                    self.name(x, GRADIENTS)

    def after_step(self, optimizer, *_):
        """Makes the second step one with new projections, a merge, or the gradients of an SVD."""
        for x in tree_leaves(optimizer.state_dict()):
            self.name(x, STATE)
        self.next_phase()
        if len(self.peaks) == 1:
            for p in [p for group in optimizer.param_groups for p in group['params']]:
                p.register_post_accumulate_grad_hook(lambda p: self.name(p.grad, GRADIENTS))
            if getattr(optimizer, 'layers', ()):
                period = math.lcm(optimizer.gap, max(optimizer.merge_every, 1))
                optimizer.steps = 2 * period - (optimizer.projection == 'sketch')
                optimizer.watch_gradients()


# -----------------------------------------------------------------------------
# what replaces a GPU, other processes and data


class Fake(FakeTensorMode):
    avoid_device_init = True  # it would look for a GPU


attend, numpy = F.scaled_dot_product_attention, torch.Tensor.numpy


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention as on a GPU; without one it takes another kernel."""
    if q.device.type != 'cuda':
        return attend(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled('cuda'):
        q, k, v = (x.to(torch.get_autocast_dtype('cuda')) for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if q.dtype != torch.float32 and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class FakeDDP(nn.parallel.DistributedDataParallel):
    """DDP wants real memory. It has a copy of the gradients that it averages."""

    def __new__(cls, model, **settings):
        ignored = model._ddp_params_and_buffers_to_ignore
        model.ddp_buckets = [torch.empty_like(p) for name, p in model.named_parameters()
                             if p.requires_grad and name not in ignored]
        model.reducer = SimpleNamespace(prepare_for_backward=nothing)
        return model


def make_real_mesh(*args, make=device_mesh.init_device_mesh):
    """A device mesh reads its table of processes, which a fake tensor would not have."""
    with _disable_current_modes():
        return make(*args)


def load_shapes(path):
    """safetensors.torch.load_file without values. The caller chooses the dtype."""
    with safe_open(path, 'pt') as file:
        return {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}


def nothing(*args, **settings):
    pass


def write_data(folder, config):
    """Writes a data set of zeros with the shape that a script's settings ask for."""
    meta = dict(vocab_size=config.get('vocab_size'), tokenizer='bytes', classes=[*'012345678'])
    Path(folder, 'meta.json').write_text(json.dumps(meta))
    for split in ('train', 'val', 'test'):
        if 'block_size' in config:
            np.zeros(config['block_size'] + 2, np.uint16).tofile(f'{folder}/{split}_0.bin')
        else:
            shape = config['batch_size'], config['img_size'], config['img_size'], 3
            np.lib.format.open_memmap(f'{folder}/{split}_images.npy', 'w+', np.uint8, shape)
            # never class 0, which logits of zero predict: a best accuracy would be read from a file
            np.save(f'{folder}/{split}_labels.npy', np.arange(shape[0]) % 2 + 1)


def predict(argv, world_size=1, batch_size=0):
    """Runs a script. Returns peaks, of the second training step and of what comes after, and its
    settings. Each peak is (bytes, bytes by kind, line)."""
    configure, config = configurator.configure, {}

    def configure_short(settings):
        config.update(configure(settings))
        config['batch_size'] = batch_size or config['batch_size']
        write_data(folder, config)
        watch.device = config['device'].split(':')[0]
        short = dict(dataset=folder, out_dir=folder, init_from='scratch', compile=False,
                     max_iters=2, eval_iters=1)  # the second step has all state
        if config.get('gradient_accumulation_steps', 1) > 1:
            short['gradient_accumulation_steps'] = 2  # the second one adds to gradients
        if config.get('merge_every'):
            short.update(merge_every=min(2, config['merge_every']), update_proj_gap=2)
        config.update({key: value for key, value in short.items() if key in config})
        settings.update(config)
        return config

    cuda = dict(is_available=lambda: True, is_bf16_supported=lambda *_, **__: True,
                current_device=lambda: 0, set_device=nothing, device=nullcontext,
                get_device_capability=lambda *_: (8, 0), stream=nullcontext,
                Stream=mock.MagicMock(), Event=mock.MagicMock(), current_stream=mock.MagicMock(),
                get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
                set_rng_state=nothing, _lazy_init=nothing)
    patches = [(sys, 'argv', argv), (configurator, 'configure', configure_short),
               (torch, 'save', nothing), (signal, 'signal', nothing), (lowrank, 'DDP', FakeDDP),
               (dist, 'gather_object', nothing), (F, 'scaled_dot_product_attention', attention),
               (device_mesh, 'init_device_mesh', make_real_mesh),
               (safetensors.torch, 'load_file', load_shapes),
               (torch.Tensor, 'pin_memory', lambda x: x),
               (torch.Tensor, 'numpy', lambda x, **how: np.zeros(x.shape)
                if isinstance(x, FakeTensor) else numpy(x, **how))]
    fake = Fake(allow_non_fake_inputs=True)  # before the patches, because it imports the compiler
    watch = Watch(argv[0], fake)
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = enter(tempfile.TemporaryDirectory())
        stack.callback(hooks.register_optimizer_step_pre_hook(watch.before_step).remove)
        stack.callback(hooks.register_optimizer_step_post_hook(watch.after_step).remove)
        for patch in patches:
            enter(mock.patch.object(*patch))
        if world_size > 1:
            dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=world_size)
            stack.callback(dist.destroy_process_group)
            enter(mock.patch.multiple(dist, init_process_group=nothing,
                                      destroy_process_group=nothing))
            enter(mock.patch.dict(os.environ, RANK='0', LOCAL_RANK='0', WORLD_SIZE=str(world_size)))
        enter(mock.patch.multiple(torch.cuda, **cuda))
        # bitsandbytes asks for it when it is imported
        enter(mock.patch('torch._C._cuda_getCurrentRawStream', nothing, create=True))
        enter(mock.patch('torch.cuda.amp.common.amp_definitely_not_available', nothing))
        enter(fake)
        enter(watch)
        enter(redirect_stdout(None))
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit:
            if len(watch.peaks) < 2:  # a wrong setting; later it is because no loss is known
                raise
    watch.next_phase()
    return watch.peaks[1:], config


# -----------------------------------------------------------------------------
# the command


def largest_batch(fits, parts):
    """The largest batch_size that fits, in multiples of parts, or one a few percent below it."""
    low, high = 0, parts
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(parts, high // 32):
        middle = (low + high) // 2 // parts * parts
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', help='with its config files and --key=value')
    parser.add_argument('--budget', default='', help='memory of each GPU, such as 12GiB or 24GB')
    parser.add_argument('--world_size', type=int, default=1, help='number of processes')
    options, more = parser.parse_known_args()
    argv, world_size = [options.script, *more], options.world_size
    peaks, config = predict(argv, world_size)
    print(f"batch_size={config['batch_size']}, {world_size=}, dtype={config['dtype']}")
    for kind in KINDS:
        print(f'{kind:28}{peaks[0][1].get(kind, 0) / 1e9:9.3f} GB')
    for name, (peak, _, line) in zip(('peak of a training step', 'evaluation, checkpoint'), peaks):
        if peak >= peaks[0][0]:  # of what comes later only more memory is of interest
            source = linecache.getline(argv[0], line).strip()
            print(f'{name:28}{peak / 1e9:9.3f} GB, in line {line}: {source}')
    if options.budget:
        unit = 2**30 if options.budget.endswith('GiB') else 1e9
        free = float(options.budget.rstrip('GiB')) * unit - 1e9

        def fits(rows):
            found = peaks if rows == first else predict(argv, world_size, rows)[0]
            return max(peak[0] for peak in found) <= free

        first = config['batch_size']
        verdict = 'fits' if fits(first) else 'does not fit'
        print(f'{verdict} into {options.budget} less 1 GB', flush=True)
        parts = math.lcm(config['heads'] if config.get('split_batch') else 1, world_size)
        print('largest batch_size:', largest_batch(fits, parts))


if __name__ == '__main__':
    main()
