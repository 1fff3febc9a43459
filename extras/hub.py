"""
Models of the hub as the ground floor's Llama, and back: transformers' folders and PEFT's adapters.

Tensors have the same names here and there. What LLaMA's relatives compute differently is in their
attention: Qwen2 has biases of q, k and v, Qwen3 has norms of q and k, and heads may have any width.
"""
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from lowrank import MHLoRALinear, merged_state_dict
from model import Llama, LlamaConfig, rotary, rotate

# -----------------------------------------------------------------------------
# the models


@dataclass
class HubConfig(LlamaConfig):
    family: str = 'llama'  # model_type in config.json
    head_dim: int = 0
    rope_scaling: dict = None  # LLaMA 3's


class HubAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, has_bias = config.head_dim, config.family == 'qwen2'
        width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, width, bias=has_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(width, config.n_embd, bias=False)
        has_norms = config.family == 'qwen3'
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if has_norms else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if has_norms else nn.Identity()

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = (proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class HubLlama(Llama):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.self_attn = HubAttention(config)

    def embed(self, idx):
        config, scaling = self.config, self.config.rope_scaling
        x = self.model.embed_tokens(idx)
        if scaling is None:
            return [x, *rotary(idx.shape[1], config.head_dim, config.rope_theta, idx.device)]
        # as in LLaMA 3.1: pairs that turn less than low_freq_factor times within the original
        # length are slowed down, and pairs that turn more than high_freq_factor times are not
        pairs = torch.arange(0, config.head_dim, 2, device=idx.device).float() / config.head_dim
        frequencies = config.rope_theta ** -pairs
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling['factor'])
        angles = torch.arange(idx.shape[1], device=idx.device).float()[:, None] * frequencies
        return [x, angles.cos(), angles.sin()]


# -----------------------------------------------------------------------------
# reading

# what changes a model's outputs, and the supported values; the first one holds if none is given
SUPPORTED = dict(model_type=('llama', 'mistral', 'qwen2', 'qwen3'), hidden_act=('silu', 'swish'),
                 attention_bias=(False, None), mlp_bias=(False, None), partial_rotary_factor=(1.0,),
                 rope_type=('default', 'llama3'), quantization_config=(None,))


def hub_folder(source):
    """The folder `source`, or a copy of the hub's repository of that name."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download
    return snapshot_download(source, allow_patterns=['*.json', '*.safetensors', '*.jinja'],
                             ignore_patterns=['*/*', 'consolidated*'])


def base_of(folder):
    """The folder of the model, if `folder` has a PEFT adapter of it, and the adapter's settings."""
    path = Path(folder, 'adapter_config.json')
    if not path.exists():
        return folder, None
    adapter = json.loads(path.read_text())
    return hub_folder(adapter['base_model_name_or_path']), adapter


def read_config(folder):
    """The HubConfig of a folder. block_size is the largest length that is computed as transformers
    does: all positions, or a sliding window's length."""
    theirs = json.loads(Path(folder, 'config.json').read_text())
    # transformers 5 has rope_parameters, 4 has rope_theta and rope_scaling
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
    theirs |= {**rope, 'rope_type': rope.get('rope_type', rope.get('type', 'default'))}
    for key, values in SUPPORTED.items():
        assert theirs.get(key, values[0]) in values, \
            f'{folder}/config.json has {key}={theirs[key]!r}, and only {values} are supported'
    family, length = theirs['model_type'], theirs['max_position_embeddings']
    if theirs.get('sliding_window') and theirs.get('use_sliding_window', family == 'mistral'):
        length = min(length, theirs['sliding_window'])
    width, heads = theirs['hidden_size'], theirs['num_attention_heads']
    return HubConfig(
        length, theirs['vocab_size'], theirs['num_hidden_layers'], heads, width,
        theirs['intermediate_size'], tied=theirs.get('tie_word_embeddings', False),
        n_kv_head=theirs.get('num_key_value_heads') or heads,
        rope_theta=theirs.get('rope_theta', 10000.0), norm_eps=theirs['rms_norm_eps'],
        family=family, head_dim=theirs.get('head_dim') or width // heads,
        rope_scaling=rope if theirs['rope_type'] == 'llama3' else None)


def read_model(source, dtype=torch.float32):
    """The model of a folder or of a name on the hub, on the CPU, with an adapter merged."""
    folder = hub_folder(source)
    base, adapter = base_of(folder)
    with torch.device('meta'):  # without memory
        net = HubLlama(read_config(base))
    weights = {}
    for path in Path(base).glob('model*.safetensors'):
        weights |= {name: x.to(dtype) for name, x in safetensors.torch.load_file(path).items()
                    if not name.endswith('.inv_freq')}
    if net.config.tied:
        weights['lm_head.weight'] = weights['model.embed_tokens.weight']
    if adapter:
        factors = safetensors.torch.load_file(Path(folder, 'adapter_model.safetensors'))
        add_adapter(weights, adapter, factors)
    net.load_state_dict(weights, assign=True)
    # an adapter may have separated the output layer from the embedding
    net.config.tied = weights['lm_head.weight'] is weights['model.embed_tokens.weight']
    if net.config.tied:
        net.lm_head.weight = net.model.embed_tokens.weight
    return net.requires_grad_()


def add_adapter(weights, adapter, factors):
    """Adds PEFT's LoRA to weights, in place."""
    assert adapter['peft_type'] == 'LORA' and not adapter.get('use_dora') and \
        not adapter.get('alpha_pattern'), 'only a plain LoRA can be read: merge this one with PEFT'
    for name in [name for name in factors if name.endswith('.lora_A.weight')]:
        layer = name.removeprefix('base_model.model.').removesuffix('lora_A.weight')
        A, B = factors.pop(name), factors.pop(name.replace('.lora_A.', '.lora_B.'))
        # rank-stabilized LoRA divides by the root of r
        scale = adapter['lora_alpha'] / len(A) ** (0.5 if adapter.get('use_rslora') else 1)
        W = weights[f'{layer}weight']
        weights[f'{layer}weight'] = torch.addmm(W.float(), B.float(), A.float(), alpha=scale).to(W)
    assert not factors, f'{min(factors)} is not a LoRA of a weight: merge the adapter with PEFT'


# -----------------------------------------------------------------------------
# writing


def write_tensors(tensors, path):
    safetensors.torch.save_file(tensors, path, metadata={'format': 'pt'})
    # save_file lets nobody but the owner read it
    path.chmod(path.with_name('tokenizer.json').stat().st_mode)


def copy_tokenizer(folders, to):
    """Copies what belongs to the tokenizer, from the first folder that has it."""
    Path(to).mkdir(parents=True, exist_ok=True)
    for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
                 'chat_template.jinja', 'generation_config.json'):
        found = [folder for folder in folders if Path(folder, name).exists()]
        if found:
            shutil.copy(Path(found[0], name), to)


def write_model(net, source, to, dtype=torch.float32):
    """Writes a folder for transformers, with all that `net` has learned merged into plain weights.
    source: what `net` was read from."""
    folder = hub_folder(source)
    base, _ = base_of(folder)
    copy_tokenizer([folder, base], to)
    weights = {name: x.to('cpu', dtype).contiguous() for name, x in merged_state_dict(net).items()}
    # an output layer that has learned by itself is no longer the embedding
    tied = torch.equal(weights['lm_head.weight'], weights['model.embed_tokens.weight'])
    if tied:
        del weights['lm_head.weight']
    write_tensors(weights, Path(to, 'model.safetensors'))
    config = json.loads(Path(base, 'config.json').read_text())
    name = str(dtype).removeprefix('torch.')
    config |= {'tie_word_embeddings': tied, 'torch_dtype': name, 'dtype': name}  # version 4, 5
    Path(to, 'config.json').write_text(json.dumps(config, indent=2))


def write_adapter(net, source, to):
    """Writes the heads of LoRA as an adapter for PEFT. `source` is the model that it belongs to."""
    folder = hub_folder(source)
    assert base_of(folder)[1] is None, f'{source} is an adapter itself: write a merged model'
    copy_tokenizer([folder], to)
    layers = {name: layer for name, layer in net.named_modules()
              if isinstance(layer, MHLoRALinear)}
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.as_one_head()  # (H r, n), (m, H r)
        tensors[f'base_model.model.{name}.lora_A.weight'] = A.detach().float().cpu().contiguous()
        tensors[f'base_model.model.{name}.lora_B.weight'] = B.detach().float().cpu().contiguous()
    write_tensors(tensors, Path(to, 'adapter_model.safetensors'))
    Path(to, 'adapter_config.json').write_text(json.dumps({
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'inference_mode': True, 'bias': 'none',
        'base_model_name_or_path': os.path.abspath(source) if folder == source else source,
        'r': len(A), 'lora_alpha': layer.scale * layer.rank, 'lora_dropout': 0.0,
        'target_modules': [*layers]}, indent=2))


# -----------------------------------------------------------------------------
# generation


@torch.no_grad()
def generate(net, tokens, count, temperature=0.8, top_k=200, ends=()):
    """Up to `count` tokens after `tokens`, until one of `ends`. temperature=0: the most likely
    ones. There is no cache: each token computes all those before it again."""
    device, start = next(net.parameters()).device, len(tokens)
    tokens = list(tokens)
    while len(tokens) < start + count:
        idx = torch.tensor([tokens[-net.config.block_size:]], device=device)
        logits = net(idx)[0, -1].float()
        if temperature == 0:
            new = logits.argmax()
        else:
            values, indices = logits.topk(top_k)
            new = indices[torch.multinomial((values / temperature).softmax(-1), 1)]
        if new.item() in ends:
            break
        tokens.append(new.item())
    return tokens[start:]
