"""
Predicts the memory that a script of this repository takes on a GPU, without a GPU:

$ python extras/memory.py train_llama.py config/llama_1b.py config/methods/galore.py \
      --budget=12GiB --world_size=4

The arguments are those of a training run. The script itself runs, a few steps long, on fake CUDA
tensors (FakeTensorMode), which have shapes and no values, so your edits of the code count. The data
set does not have to exist. With --budget it also searches the largest batch_size that fits, over
all processes; --world_size is the number of processes, of which each has a GPU.

What the prediction leaves out: CUDA's context, the workspaces of libraries and the gaps of the
allocator, together about 1 GB, which is kept free of the budget; and torch.compile, which can only
lower the peak. A build of torch without CUDA needs g++ once.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import linecache
import math
import os
import re
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
from unittest import mock

TORCH = Path(importlib.util.find_spec('torch').origin).parent
LIBRARY = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::Stream;
static const Device gpu(c10::DeviceType::CUDA, 0);
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def load_library():
    """Makes a build of torch without CUDA believe that there is a GPU, or autograd would refuse fake
    CUDA tensors. It has to be loaded before torch, which asks for GPUs only once."""
    version = {}
    exec(Path(TORCH, 'version.py').read_text(), version)
    if version['cuda'] is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'fake_cuda.so')
            subprocess.run(['g++', '-std=c++20', '-shared', '-fPIC', '-w', '-xc++', '-', '-o', path,
                            f'-I{TORCH}/include', f'-L{TORCH}/lib', f'-Wl,-rpath,{TORCH}/lib',
                            '-lc10', '-ltorch_cpu'], input=LIBRARY.encode(), check=True)
            ctypes.CDLL(path)


if 'torch' not in sys.modules:
    load_library()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import lowrank

KINDS = 'weights', 'optimizer state', 'gradients', 'activations and temporaries'


class Watch(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are alive, by kind, and keeps their peak."""

    def __init__(self, script, fake=None):
        super().__init__()
        self.script, self.fake, self.device = script, fake, 'cuda'
        self.alive = {}  # a storage's address: (its kind, its bytes, a weak reference)
        self.steps = 0
        self.now = Counter()
        self.reset()

    def reset(self):
        self.peak, self.parts, self.line = 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and self.fake:
            return 0  # .item(), or as a bool False: `no weight is infinite`, `no signal came`
        out = function(*args, **kwargs or {})
        if self.fake:
            self.fake.fake_tensor_converter.tensor_memo.clear()  # it would keep tensors alive
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.device.type == self.device:
                self.note(x)
        if self.now.total() > self.peak:
            self.peak, self.parts = self.now.total(), dict(self.now)
            frame = sys._current_frames()[threading.main_thread().ident]  # backward has its thread
            while frame and frame.f_code.co_filename != self.script:
                frame = frame.f_back
            self.line = frame.f_lineno if frame else 0
        return out

    def note(self, x, kind=None):
        """Counts the storage of x, which views share, as of this kind."""
        if x.is_meta or x.device.type != self.device:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            old, size, reference = self.alive[key]
            if kind and kind != old:
                self.now[old] -= size
                self.now[kind] += size
                self.alive[key] = kind, size, reference
        else:
            kind, size = kind or KINDS[3], storage.nbytes()
            self.now[kind] += size
            self.alive[key] = kind, size, weakref.ref(storage, lambda _: self.forget(key))

    def forget(self, key):
        kind, size, _ = self.alive.pop(key)
        self.now[kind] -= size

    def before_step(self, optimizer, *_):
        for module in gc.get_objects():
            if issubclass(type(module), nn.Module):
                for p in module.parameters(recurse=False):
                    self.note(p, KINDS[0])
                    if p.grad is not None:
                        self.note(p.grad, KINDS[2])
                for name, x in module.named_buffers(recurse=False):
                    self.note(x, KINDS[name in ('Q', 'velocity')])  # of GaLore, outer optimizers
                for x in getattr(module, 'buckets', ()):
                    self.note(x, KINDS[2])

    def after_step(self, optimizer, *_):
        """Lets the second step be one with new projections, a merge, and gradients for an SVD."""
        for x in tree_leaves(optimizer.state_dict()):
            if torch.is_tensor(x):
                self.note(x, KINDS[1])
        self.steps += 1
        if self.steps == 1:
            self.reset()  # from now on there is optimizer state
            for group in optimizer.param_groups:
                for p in group['params']:
                    p.register_post_accumulate_grad_hook(
                        lambda p: p.grad is not None and self.note(p.grad, KINDS[2]))
            if getattr(optimizer, 'layers', ()):
                period = math.lcm(optimizer.gap, max(optimizer.merge_every, 1))
                optimizer.steps = 2 * period - (optimizer.projection == 'sketch')
                optimizer.watch_gradients()


class Fake(FakeTensorMode):
    avoid_device_init = True  # else it would look for a GPU


attend = F.scaled_dot_product_attention


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What F.scaled_dot_product_attention does on a GPU; here it would choose another kernel."""
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


def buckets(model, **settings):
    """Stands for DDP, which wants real memory: it has a copy of the gradients that it averages."""
    ignored = model._ddp_params_and_buffers_to_ignore
    model.buckets = [torch.empty_like(p) for name, p in model.named_parameters()
                     if p.requires_grad and name not in ignored]
    return model


def write_data(folder, config):
    """Writes a data set of zeros with the shape that a script's settings ask for."""
    if 'block_size' in config:
        meta = dict(vocab_size=config['vocab_size'], tokenizer='bytes')
        for split in ('train', 'val'):
            np.zeros(config['block_size'] + 2, np.uint16).tofile(Path(folder, f'{split}_0.bin'))
    else:
        meta = dict(classes=[str(i) for i in range(9)])
        count = max(config['batch_size'], 9)
        for split in ('train', 'val', 'test'):
            shape = count, config['img_size'], config['img_size'], 3
            np.lib.format.open_memmap(f'{folder}/{split}_images.npy', 'w+', np.uint8, shape)
            np.save(f'{folder}/{split}_labels.npy', np.arange(count) % 2 + 1)  # scores of zero: accuracy 0
    Path(folder, 'meta.json').write_text(json.dumps(meta))


def predict(argv, world_size=1, batch_size=0, real=False):
    """Runs a script. Returns its Watch and its settings. real: with real tensors, for tests."""
    configure, found = configurator.configure, {}

    def configure_short(settings, argv=None):
        config = configure(settings, argv)
        config['batch_size'] = batch_size or config['batch_size']
        found.update(config)
        if 'dataset' in config:
            write_data(folder, config)
        watch.device = config['device'].split(':')[0]
        # the second micro-batch finds gradients, and the second step finds optimizer state
        short = dict(dataset=folder, out_dir=folder, init_from='scratch', max_iters=2, eval_iters=1,
                     eval_interval=2, gradient_accumulation_steps=2, compile=False)
        for key, value in short.items():
            if key in config:
                config[key] = min(config[key], 2) if key.startswith('gradient_acc') else value
        settings.update(config)
        return config

    cuda = dict(is_available=lambda: True, is_bf16_supported=lambda *_, **__: True,
                current_device=lambda: 0, set_device=lambda *_: None, device=nullcontext,
                get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
                set_rng_state=lambda *_: None, _lazy_init=lambda: None)
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = enter(tempfile.TemporaryDirectory())
        watch = Watch(argv[0])
        for owner, name, value in [
                (sys, 'argv', argv), (configurator, 'configure', configure_short),
                (torch, 'save', lambda *_: None), (F, 'scaled_dot_product_attention', attention),
                (lowrank, 'DDP', buckets), (dist, 'gather_object', lambda *_: None),
                (signal, 'signal', lambda *_: None)]:
            enter(mock.patch.object(owner, name, value))
        for register, hook in [(register_optimizer_step_pre_hook, watch.before_step),
                               (register_optimizer_step_post_hook, watch.after_step)]:
            stack.callback(register(hook).remove)
        if not real:
            enter(mock.patch.multiple(torch.cuda, **cuda))
            enter(mock.patch.object(torch.cuda.amp.common, 'amp_definitely_not_available',
                                    lambda: False))
            numpy = torch.Tensor.numpy
            enter(mock.patch.object(torch.Tensor, 'numpy', lambda x, **how: np.zeros(x.shape)
                                    if isinstance(x, FakeTensor) else numpy(x, **how)))
            watch.fake = enter(Fake(allow_non_fake_inputs=True))
        if world_size > 1:
            dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=world_size)
            stack.callback(dist.destroy_process_group)
            enter(mock.patch.object(dist, 'init_process_group', lambda *_: None))
            enter(mock.patch.object(dist, 'destroy_process_group', lambda: None))
            enter(mock.patch.dict(os.environ, RANK='0', LOCAL_RANK='0', WORLD_SIZE=str(world_size)))
        enter(watch)
        enter(redirect_stdout(None))
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit:
            if watch.steps < 2:
                raise  # a mistake in the settings; later ones only find that no loss is known
    return watch, found


def largest_batch(total, parts, free):
    """The largest multiple of parts, or one at most 2% below it, for which total(batch_size) is at
    most free bytes; 0 if there is none. Totals are nearly linear, so the line between the bounds
    gives each guess."""
    low, below = parts, total(parts)
    high = above = None
    if below > free:
        return 0
    while high is None or high - low > max(parts, low // 50):
        guess = 4 * low
        if high:
            guess = low + int((free - below) * (high - low) / (above - below))
            guess = min(max(guess // parts * parts, low + parts), high - parts)
        size = total(guess)
        if size <= free:
            low, below = guess, size
        else:
            high, above = guess, size
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script')
    parser.add_argument('--budget', help="memory of a GPU, such as 12GiB or 24GB")
    parser.add_argument('--world_size', type=int, default=1, help='processes, one on each GPU')
    options, argv = parser.parse_known_args()
    argv, world_size = [options.script, *argv], options.world_size

    watch, config = predict(argv, world_size)
    print(f"predicted for {' '.join(argv)}\nbatch_size={config['batch_size']}, "
          f"dtype={config['dtype']}, device={config['device']}, {world_size=}")
    for kind in KINDS:
        print(f'{kind:28}{watch.parts.get(kind, 0) / 1e9:9.3f} GB')
    source = linecache.getline(argv[0], watch.line).strip()
    print(f'peak                        {watch.peak / 1e9:9.3f} GB, in line {watch.line}: {source}')
    if options.budget:
        free = float(re.match(r'[\d.]+', options.budget)[0])
        free = free * (2**30 if options.budget.endswith('GiB') else 1e9) - 1e9
        print(f'{options.budget} {"suffice" if watch.peak <= free else "do not suffice"}, with 1 GB '
              'left to CUDA', flush=True)
        parts = math.lcm(config['heads'] if config.get('split_batch') else 1, world_size)
        known = {config['batch_size']: watch.peak}

        def total(rows):
            if rows not in known:
                known[rows] = predict(argv, world_size, rows)[0].peak
            return known[rows]
        print('largest batch_size:', largest_batch(total, parts, free))


if __name__ == '__main__':
    main()
