"""
GPT-2 and LLaMA: configuration, layers, initialisation, loading weights. Knows nothing of LoRA or GaLore.

Parameter names as in nanoGPT and in transformers' LlamaForCausalLM. Where the vocabulary is large, the loss never holds
all logits at once (`language_loss`).
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# the loss, shared by both models


ONE_PIECE = 2**26  # logits: up to here, 0.8 GB at most, chunks would cost more time than their memory is worth


class CrossEntropy(nn.Module):
    """Mean cross entropy in float32 or wider. A module, so that it can be compiled, as a block is: the wide logits then
    never reach memory."""

    def forward(self, logits, targets):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def language_loss(head, x, targets, cross_entropy=CrossEntropy()):
    """
    Mean cross entropy in nats per token. head: the output layer; x: (batch, time, width); targets: (batch, time), where
    -100 does not count; cross_entropy: what computes it where all logits are there at once.

    Above ONE_PIECE logits a plain nn.Linear goes through F.linear_cross_entropy in chunks of tokens, so that the
    logits of all tokens never exist together; what the chunks add up is float32. Below, on two CPU cores, 2,048
    tokens of width 512 and 32,000 words in bfloat16: 0.63 s in one piece, 0.79 s in chunks. Any other layer (a head
    on `logit`) is called, not bypassed.
    """
    x, targets = x.flatten(0, 1), targets.flatten()  # (tokens, width), (tokens,)
    chunks = type(head) is nn.Linear and head.out_features > head.in_features
    chunks = chunks and hasattr(nn, 'LinearCrossEntropyOptions')  # torch 2.13; before that it is one piece
    if not chunks or len(targets) * head.out_features <= ONE_PIECE:
        return cross_entropy(head(x), targets)
    weight = head.weight
    if torch.is_autocast_enabled(x.device.type):  # the chunked operator is not on autocast's list
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.float32, torch.float64):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=1024, acc_policy='accurate')
            return F.linear_cross_entropy(x, weight, targets, options=options)
        # In 16 bits a mean inside the operator would round the loss to three digits, and its gradients are taken
        # before a GradScaler could scale them. Token by token neither happens, and the mean is taken in float32.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy='accurate', acc_dtype=torch.float32)
        losses = F.linear_cross_entropy(x, weight, targets, reduction='none', options=options).float()
        return losses.sum() / (targets != -100).sum()


# -----------------------------------------------------------------------------
# GPT-2


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in linears and norms, as in GPT-2
    checkpointing: bool = False  # recompute each block's activations in the backward pass


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (batch, head, time, size)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(b, t, c)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, tied embedding and output layer."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd={config.n_embd} does not split over n_head={config.n_head}: '
                             'set n_embd to a multiple of n_head')
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf, 2017)
        for name, parameter in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the residual stream sums 2 L projections (GPT-2, section 2.3)
                shrink = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)

    @property
    def blocks(self):
        """What torch.compile compiles one by one."""
        return self.transformer.h

    def hidden(self, idx):
        """idx: (batch, time) token numbers. Returns the last layer's output after its norm, (batch, time, width)."""
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: (batch, time). Returns the mean loss in nats, or, without targets, the logits."""
        x = self.hidden(idx)
        return self.lm_head(x) if targets is None else language_loss(self.lm_head, x, targets, self.cross_entropy)

    @classmethod
    def from_pretrained(cls, source, block_size=1024, dropout=0.0):
        """
        OpenAI's weights. source: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (from the hub, openai-community),
        or the path of a model.safetensors in the same layout. block_size: positions to keep, at most 1024.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        path = source
        if source in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import LocalEntryNotFoundError
            try:
                path = hf_hub_download(f'openai-community/{source}', 'model.safetensors')
            except LocalEntryNotFoundError as error:
                raise FileNotFoundError(f"the weights '{source}' are not cached and the hub cannot be reached: give "
                                        'the path of a model.safetensors as init_from') from error
        elif not (source.endswith('.safetensors') and os.path.isfile(path)):
            raise FileNotFoundError(f"'{source}' is no file of GPT-2's weights: set init_from to 'scratch', 'resume', "
                                    "'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or the path of a model.safetensors")
        try:
            state = {name.removeprefix('transformer.'): value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"'{path}' is damaged or no safetensors file ({error}): check the path") from None
        if not {'wte.weight', 'wpe.weight', 'h.0.attn.c_attn.weight'} <= state.keys():
            raise ValueError(f"'{path}' holds no GPT-2 in the hub's layout (wte, wpe, h.0.attn.c_attn): give another "
                             'file')
        depth = 1 + max(int(name.split('.')[1]) for name in state if name.startswith('h.'))
        vocab_size, width = state['wte.weight'].shape
        if block_size > len(state['wpe.weight']):
            raise ValueError(f"block_size={block_size} is more than the {len(state['wpe.weight'])} positions of "
                             f"'{source}': set a smaller one")
        model = cls(GPTConfig(block_size, vocab_size, depth, width // 64, width, dropout))  # every size has 64 a head
        state['wpe.weight'] = state['wpe.weight'][:block_size]
        with torch.no_grad():
            for name, parameter in model.transformer.named_parameters():
                value = state[name]
                # the hub's file holds Conv1D weights (in, out) where nn.Linear has (out, in)
                parameter.copy_(value.T if value.dim() == 2 and not name.startswith('w') else value)
        return model


# -----------------------------------------------------------------------------
# LLaMA

# width, layers, heads, MLP width, as trained by GaLore (arXiv 2403.03507, appendix C.2) and its published configs
SIZES = {'9m': (128, 4, 4, 352), '60m': (512, 8, 8, 1376), '130m': (768, 12, 12, 2048), '350m': (1024, 24, 16, 2736),
         '1b': (2048, 24, 32, 5461), '7b': (4096, 32, 32, 11008)}


@dataclass
class LlamaConfig:
    block_size: int = 256  # only what it is trained at: rotary positions have no table
    vocab_size: int = 32000
    n_embd: int = 512
    n_layer: int = 8
    n_head: int = 8
    n_mlp: int = 1376
    n_kv_head: int = 8  # fewer than n_head: grouped-query attention
    rope_base: float = 10000.0
    checkpointing: bool = False  # recompute each layer's activations in the backward pass


def rotary(positions, size, base):
    """Rotary embedding (Su et al., arXiv 2104.09864): cosines and sines, each (time, size / 2), in float32."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i + size/2}) of x (batch, head, time, size), transformers' layout, by their angles."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.n_embd // config.n_head
        self.grouped = config.n_kv_head != config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_head * self.size, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.size, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.size, bias=False)
        self.o_proj = nn.Linear(config.n_head * self.size, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = (proj(x).view(b, t, -1, self.size).transpose(1, 2)  # (batch, head, time, size)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True,
                                           enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.down_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU (Shazeer, arXiv 2002.05202)


class LlamaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """
    LLaMA (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases, untied output.

    Built on the meta device it costs nothing; `to_empty` and `init_weights` then fill it in the dtype and on the device
    where it stays, so that 7B in bfloat16 never exist in float32.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head or config.n_head % config.n_kv_head or config.n_embd // config.n_head % 2:
            raise ValueError(f'n_embd={config.n_embd}, n_head={config.n_head}, n_kv_head={config.n_kv_head} clash: '
                             'n_embd / n_head has to be a whole even number, n_head a multiple of n_kv_head')
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList([LlamaLayer(config) for _ in range(config.n_layer)]),
            norm=nn.RMSNorm(config.n_embd, eps=1e-6),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices normal with deviation 0.02 (transformers' initializer_range), norms one. Returns the model."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else nn.init.ones_(parameter)
        return self

    @property
    def blocks(self):
        """What torch.compile compiles one by one."""
        return self.model.layers

    def hidden(self, idx):
        """idx: (batch, time) token numbers. Returns the last layer's output after its norm, (batch, time, width)."""
        config = self.config
        positions = torch.arange(idx.shape[1], device=idx.device)
        cos, sin = rotary(positions, config.n_embd // config.n_head, config.rope_base)  # once for all layers
        x = self.model.embed_tokens(idx)
        for layer in self.model.layers:
            if config.checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return self.model.norm(x)

    def forward(self, idx, targets=None):
        """idx, targets: (batch, time). Returns the mean loss in nats, or, without targets, the logits."""
        x = self.hidden(idx)
        return self.lm_head(x) if targets is None else language_loss(self.lm_head, x, targets, self.cross_entropy)


# -----------------------------------------------------------------------------
# text


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None, vocab_size=None):
    """
    Continues token numbers idx (batch, time) by max_new_tokens; the context is cropped to the model's block_size.

    temperature: 0 takes the most likely token; top_k: sample among the k most likely, 0: among all; generator: a
    torch.Generator; vocab_size: of the tokenizer, where the model's is larger.
    """
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(idx[:, -model.config.block_size:])[:, -1])
        logits = logits[:, :vocab_size].float()  # (batch, vocab)
        if temperature == 0:
            following = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        idx = torch.cat([idx, following], dim=1)
    return idx
