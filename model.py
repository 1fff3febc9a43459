"""
GPT-2 and LLaMA: configuration, layers, initialisation, loading weights. Knows nothing of LoRA or GaLore.

GPT: parameter names as in nanoGPT. The loss never holds all logits at once where that is no slower (`language_loss`).
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# the loss, shared by both models


def language_loss(head, x, targets):
    """
    Mean cross entropy in nats per token. head: the output layer; x: (batch, time, width); targets: (batch, time).

    A plain nn.Linear goes through F.linear_cross_entropy in chunks of tokens, so that the logits of all tokens never
    exist together. On two CPU cores, 2,048 tokens, width 768, vocabulary 50,257: 3.3 s against 3.7 s unchunked in
    float32, 2.0 s against 2.4 s in bfloat16. Any other layer (a head on `logit`) is called, not bypassed.
    """
    x, targets = x.flatten(0, 1), targets.flatten()  # (tokens, width), (tokens,)
    if type(head) is not nn.Linear or head.out_features <= head.in_features:  # small vocabularies: chunks cost time
        return F.cross_entropy(head(x).float() if x.dtype != torch.float64 else head(x), targets)
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
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy='accurate')
        return F.linear_cross_entropy(x, weight, targets, reduction='none', options=options).float().mean()


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


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (batch, head, time, c / head)
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
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf, 2017)
        for name, parameter in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the residual stream sums 2 L projections (GPT-2, section 2.3)
                shrink = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)

    def hidden(self, idx):
        """idx: (batch, time) token numbers. Returns the last layer's output after its norm, (batch, time, width)."""
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: (batch, time). Returns the mean loss in nats, or, without targets, logits (batch, time, vocab)."""
        x = self.hidden(idx)
        return self.lm_head(x) if targets is None else language_loss(self.lm_head, x, targets)

    @classmethod
    def from_pretrained(cls, source, block_size=1024, dropout=0.0):
        """
        OpenAI's weights. source: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (from the hub, openai-community),
        or the path of a model.safetensors in the same layout. block_size: positions to keep, at most 1024.
        """
        from safetensors.torch import load_file
        path = source
        if not source.endswith('.safetensors'):
            from huggingface_hub import hf_hub_download
            path = hf_hub_download(f'openai-community/{source}', 'model.safetensors')
        elif not os.path.isfile(path):
            raise FileNotFoundError(f"there are no weights at '{path}': give a model.safetensors, or init_from='gpt2'")
        state = {name.removeprefix('transformer.'): value for name, value in load_file(path).items()}
        depth = 1 + max(int(name.split('.')[1]) for name in state if name.startswith('h.'))
        vocab_size, width = state['wte.weight'].shape
        model = cls(GPTConfig(block_size, vocab_size, depth, width // 64, width, dropout))  # every size has 64 a head
        state['wpe.weight'] = state['wpe.weight'][:block_size]
        with torch.no_grad():
            for name, parameter in model.transformer.named_parameters():
                value = state[name]
                # the hub's file holds Conv1D weights (in, out) where nn.Linear has (out, in)
                parameter.copy_(value.T if value.dim() == 2 and not name.startswith('w') else value)
        return model


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
    """
    Continues token numbers idx (batch, time) by max_new_tokens; the context is cropped to the model's block_size.

    temperature: 0 takes the most likely token; top_k: sample among the k most likely; generator: a torch.Generator.
    """
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(idx[:, -model.config.block_size:])[:, -1]).float()  # (batch, vocab)
        if temperature == 0:
            following = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        idx = torch.cat([idx, following], dim=1)
    return idx
