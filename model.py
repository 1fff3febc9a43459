"""
GPT-2 and the LLaMA family: configuration, layers, initialisation, text.

Parameters are named as in nanoGPT, and in transformers' LlamaForCausalLM. Nothing here knows LoRA
or GaLore.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# what both models share

# logits, 0.8 GB at most: up to here chunks cost more time than their memory is worth
ONE_PIECE = 2**26


class CrossEntropy(nn.Module):
    """Cross entropy in float32 or wider.

    A module, so that it can be compiled, as a block is: the wide logits then never reach memory."""

    def forward(self, logits, targets, reduction='mean'):
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, reduction=reduction)


def language_loss(head, x, targets, weights=None, cross_entropy=CrossEntropy()):
    """
    Returns the mean cross entropy in nats per token; with weights (batch,), the sum over all tokens
    of the loss of a token times the weight of its row.

    head: the output layer; x: (batch, time, width); targets: (batch, time), -100 is not counted;
    cross_entropy: computes the loss if all logits are formed at once.

    To save memory, a plain nn.Linear with more than ONE_PIECE logits goes through `chunked_loss`.
    It is slower: 2,048 tokens of width 512 and 32,000 words in bfloat16 on two CPU cores take
    0.79 s in chunks, 0.63 s in one piece. Other layers are called.
    """
    reduction = 'mean' if weights is None else 'none'
    shape = targets.shape
    x, targets = x.flatten(0, 1), targets.flatten()  # (tokens, width), (tokens,)
    is_wide = type(head) is nn.Linear and head.out_features > head.in_features
    is_large = is_wide and len(targets) * head.out_features > ONE_PIECE
    if is_large and hasattr(nn, 'LinearCrossEntropyOptions'):  # from torch 2.13 on
        losses = chunked_loss(head.weight, x, targets, reduction)
    else:
        losses = cross_entropy(head(x), targets, reduction)
    return losses if weights is None else (weights[:, None] * losses.view(shape)).sum()


def chunked_loss(weight, x, targets, reduction):
    """Computes the cross entropy of the logits x weight^T, never forming all of them at once. x:
    (tokens, width); weight: (words, width); targets: (tokens,); reduction: 'mean' or 'none'."""
    if torch.is_autocast_enabled(x.device.type):  # the chunked operator is not on autocast's list
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.device.type == 'cuda' and x.dtype == torch.bfloat16:
        # before Ampere a card's products of bfloat16 have no sums in float32, and are slow anyway
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            x, weight = x.float(), weight.float()
    tokens = min(1024, max(1, ONE_PIECE // len(weight)))  # of a chunk
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.float32, torch.float64):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=tokens, acc_policy='compact')
            return F.linear_cross_entropy(x, weight, targets, reduction=reduction, options=options)
        # In 16 bits the operator's own mean would round the loss to three digits, and its gradients
        # would be computed before a GradScaler could scale them. With one loss for each token
        # neither happens; the mean is taken below, in float32. 'accurate' computes gradients by
        # products in float32, which are slow on cards and fast on CPUs.
        is_fast = x.device.type == 'cuda' and x.dtype == torch.bfloat16
        options = nn.LinearCrossEntropyOptions(
            batch_chunk_size=tokens, acc_policy='compact' if is_fast else 'accurate',
            acc_dtype=torch.float32)
        losses = F.linear_cross_entropy(x, weight, targets, reduction='none', options=options)
        losses = losses.float()
        return losses if reduction == 'none' else losses.sum() / (targets != -100).sum()


@dataclass
class Apart:
    """Documents that lie one after the other in rows of tokens and do not see each other. mask:
    (batch, 1, time, time), 0 where a token sees another, else -inf: one for all layers, where each
    would make its own of True and False and keep it. spans: for each row the list of (begin, end)
    of its documents; it is filled on a CPU only."""
    mask: torch.Tensor
    spans: list


def apart(documents, dtype):
    """Returns the `Apart` of documents (batch, time), the number of each token's document. dtype:
    what attention computes in where autocast says nothing."""
    if torch.is_autocast_enabled(documents.device.type):
        dtype = torch.get_autocast_dtype(documents.device.type)
    same = documents[:, :, None] == documents[:, None, :]  # (batch, time, time)
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    mask.masked_fill_(~same.tril(), -torch.inf)
    return Apart(mask[:, None], spans_of(documents))


def spans_of(documents):
    """For each row of documents (batch, time) the list of (begin, end) of its documents. On a GPU,
    which one would have to wait for, it is empty."""
    spans = []
    for row in documents if documents.device.type == 'cpu' else ():
        lengths = row.unique_consecutive(return_counts=True)[1]
        ends = lengths.cumsum(0).tolist()
        spans.append([*zip([0, *ends], ends)])
    return spans


def attention(q, k, v, documents=None, cache=None, dropout=0.0, grouped=False):
    """
    Causal attention of q, k, v (batch, heads, time, size); returns a tensor of q's shape.

    documents: an `Apart`; None: a token sees all before it. cache: a dict, empty or with k and v of
    earlier tokens; the new k and v are appended. grouped: k and v have fewer heads than q.
    """
    if documents is not None and not torch.compiler.is_compiling() and documents.spans:
        # one by one: 2,048 tokens in 16 documents take an eighth of the time of one call for all
        rows = []
        for i, spans in enumerate(documents.spans):
            parts = [attention(*(x[i:i + 1, :, begin:end] for x in (q, k, v)), dropout=dropout,
                               grouped=grouped) for begin, end in spans]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows)
    mask = None if documents is None else documents.mask
    if cache is not None:
        if cache:
            k = torch.cat([cache['k'], k], 2)
            v = torch.cat([cache['v'], v], 2)
        cache.update(k=k, v=v)
    new, all_of_them = q.shape[2], k.shape[2]
    if 1 < new < all_of_them:
        before = all_of_them - new
        mask = torch.ones(new, all_of_them, dtype=torch.bool, device=q.device).tril(before)
    # few GPU kernels that save memory take a mask and shared heads; in float32, and on cards before
    # Ampere, none does: these compute in float16 (a compiled block cannot ask what card it is)
    lacks_kernel = q.device.type == 'cuda' and q.dtype != torch.bfloat16
    if grouped and (mask is not None or lacks_kernel):
        shares = q.shape[1] // k.shape[1]  # heads of q that share one of k and v
        k, v = (x[:, :, None].expand(-1, -1, shares, -1, -1).flatten(1, 2) for x in (k, v))
        grouped = False
    is_causal = mask is None and new == all_of_them
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=is_causal, enable_gqa=grouped)


def places_in(documents):
    """Returns the place of each token in its document, (batch, time), from 0. documents: (batch,
    time), the number of each token's document."""
    index = torch.arange(documents.shape[1], device=documents.device)
    is_first = documents != documents.roll(1, 1)
    is_first[:, 0] = True
    start = torch.where(is_first, index, 0).cummax(1).values
    return index - start


class LanguageModel(nn.Module):
    """What GPT and Llama share. Each of them has `embedding`, `blocks` (compiled one by one),
    `hidden` and `lm_head`."""

    def tie(self):
        """Gives the output layer the embedding's weight, if config.tied; `to_empty` separates them.
        An output layer that is no plain nn.Linear (it has heads) keeps its own weight."""
        if self.config.tied and type(self.lm_head) is nn.Linear:
            self.lm_head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self):
        """Matrices normal with deviation 0.02, norms one, biases zero."""
        self.tie()
        for name, parameter in self.named_parameters():
            self.draw_(name, parameter)

    def draw_(self, name, x):
        """Fills x, the parameter of that name, as `init_weights` describes, and returns it."""
        if name.endswith('bias'):
            return nn.init.zeros_(x)
        if x.dim() == 1:
            return nn.init.ones_(x)
        # GPT-2's residual stream sums 2 L projections (its section 2.3)
        shrink = math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else 1.0
        return nn.init.normal_(x, std=0.02 / shrink)

    def drawn(self, **how):
        """Yields (name, tensor) for each parameter, drawn by `draw_`; how: its dtype and device."""
        for name, parameter in self.named_parameters():
            yield name, self.draw_(name, torch.empty_like(parameter, **how))

    def through_blocks(self, x, *more, cache=None):
        """Returns x (batch, time, width) after all blocks; with config.checkpointing, training
        recomputes their activations. cache: one dict for each block, see `attention`."""
        for i, block in enumerate(self.blocks):
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, *more, use_reentrant=False)
            elif cache is None:
                x = block(x, *more)
            else:
                x = block(x, *more, cache[i])
        return x

    def forward(self, idx, targets=None, weights=None, documents=None):
        """Returns the logits of tokens idx (batch, time), or `language_loss` with targets (batch,
        time). weights: (batch,); documents: (batch, time), each token's, if they are apart."""
        x = self.hidden(idx, documents)
        if targets is None:
            return self.lm_head(x)
        return language_loss(self.lm_head, x, targets, weights, self.cross_entropy)


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
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding (Press and Wolf, 2017)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, documents=None, cache=None):
        b, t, c = x.shape
        qkv = self.c_attn(x).view(b, t, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, head, time, size)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, documents, cache, dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        y = self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, documents=None, cache=None):
        x = x + self.attn(self.ln_1(x), documents, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(LanguageModel):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, tied embedding and output
    layer."""

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
            ln_f=nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.init_weights()

    @property
    def embedding(self):
        return self.transformer.wte

    @property
    def blocks(self):
        return self.transformer.h

    def hidden(self, idx, documents=None, cache=None):
        """Returns the last block's output after the final norm, (batch, time, width). idx: tokens
        (batch, time); cache: from `new_cache`, with the tokens before these."""
        if documents is None:
            position = positions_after(cache, idx)
        else:
            position = places_in(documents)
            documents = apart(documents, self.embedding.weight.dtype)
        x = self.embedding(idx) + self.transformer.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        return self.transformer.ln_f(self.through_blocks(x, documents, cache=cache))


# -----------------------------------------------------------------------------
# LLaMA

# width, layers, heads, MLP width, as trained by GaLore (arXiv 2403.03507, appendix C.1; published
# configs)
SIZES = {'9m': (128, 4, 4, 352), '60m': (512, 8, 8, 1376), '130m': (768, 12, 12, 2048),
         '350m': (1024, 24, 16, 2736), '1b': (2048, 24, 32, 5461), '7b': (4096, 32, 32, 11008)}


@dataclass
class LlamaConfig:
    block_size: int = 256  # only what it is trained at: rotary positions have no table
    vocab_size: int = 32000
    n_embd: int = 512
    n_layer: int = 8
    n_head: int = 8
    n_mlp: int = 1376
    n_kv_head: int = None  # None: n_head; fewer: grouped-query attention
    rope_base: float = 10000.0
    checkpointing: bool = False  # recompute each layer's activations in the backward pass
    head_size: int = None  # None: n_embd / n_head
    norm_eps: float = 1e-6
    rope_scaling: dict = None  # LLaMA 3's, see `rotary`
    tied: bool = False  # the output layer is the embedding
    family: str = 'llama'  # 'mistral': the same; 'qwen2': biases of q, k, v; 'qwen3': norms of q, k

    def __post_init__(self):
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head


def rotary(positions, size, base, scaling=None):
    """
    Rotary embedding (Su et al., arXiv 2104.09864): cosines and sines, each (time, size / 2), in
    float32.

    scaling: LLaMA 3.1's for longer texts, with the keys that config.json has for it. Waves longer
    than original_max_position_embeddings / low_freq_factor are slowed by `factor`, those shorter
    than original / high_freq_factor are not, and in between the two are mixed.
    """
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-pairs / size)
    if scaling:
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        length = scaling['original_max_position_embeddings']
        waves = length * frequencies / (2 * math.pi)  # in that length
        fast = ((waves - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / scaling['factor'])
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i + size/2}) of x (batch, head, time, size), transformers'
    layout."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.head_size
        self.grouped = config.n_kv_head != config.n_head
        bias = config.family == 'qwen2'
        self.q_proj = nn.Linear(config.n_embd, config.n_head * self.size, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.size, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.size, bias=bias)
        self.o_proj = nn.Linear(config.n_head * self.size, config.n_embd, bias=False)
        self.normed = config.family == 'qwen3'
        if self.normed:
            self.q_norm = nn.RMSNorm(self.size, config.norm_eps)
            self.k_norm = nn.RMSNorm(self.size, config.norm_eps)

    def forward(self, x, cos, sin, documents=None, cache=None):
        b, t, _ = x.shape
        q, k, v = (proj(x).view(b, t, -1, self.size).transpose(1, 2)  # (batch, head, time, size)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attention(q, k, v, documents, cache, grouped=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.down_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x):
        # SwiGLU (arXiv 2002.05202)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, documents=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(LanguageModel):
    """
    LLaMA (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU; and its relatives.

    Built on the meta device it costs nothing. Scripts then fill it tensor by tensor (`drawn`,
    `fill`) where it stays: 7B in bfloat16 never exist in float32.
    """

    def __init__(self, config):
        super().__init__()
        divides = config.n_embd % config.n_head == 0
        is_set = config.head_size != config.n_embd // config.n_head
        if not (divides or is_set) or config.n_head % config.n_kv_head or config.head_size % 2:
            raise ValueError(f'n_embd={config.n_embd}, n_head={config.n_head}, '
                             f'n_kv_head={config.n_kv_head} clash: n_embd / n_head has to be a '
                             'whole even number, n_head a multiple of n_kv_head')
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList([LlamaLayer(config) for _ in range(config.n_layer)]),
            norm=nn.RMSNorm(config.n_embd, config.norm_eps),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.init_weights()

    @property
    def embedding(self):
        return self.model.embed_tokens

    @property
    def blocks(self):
        return self.model.layers

    def hidden(self, idx, documents=None, cache=None):
        """See GPT.hidden."""
        positions, c = positions_after(cache, idx), self.config
        # once for all layers; documents need no own positions: only distances of tokens count
        cos, sin = rotary(positions, c.head_size, c.rope_base, c.rope_scaling)
        if documents is not None:
            documents = apart(documents, self.embedding.weight.dtype)
        x = self.through_blocks(self.embedding(idx), cos, sin, documents, cache=cache)
        return self.model.norm(x)


def make_model(shape):
    """Builds a GPT or Llama and draws its weights. shape: its configuration, or that as a dict, see
    `dataclasses.asdict`."""
    if isinstance(shape, dict):
        shape = LlamaConfig(**shape) if 'n_mlp' in shape else GPTConfig(**shape)
    return GPT(shape) if isinstance(shape, GPTConfig) else Llama(shape)


# -----------------------------------------------------------------------------
# text

def new_cache(model):
    """Returns an empty cache: `hidden` keeps keys and values in it, for the tokens that follow."""
    return [{} for _ in model.blocks]


def length_of(cache):
    """How many tokens a cache has seen."""
    return cache[0]['k'].shape[2] if cache and cache[0] else 0


def crop(cache, length):
    """Forgets all but the first tokens, in place."""
    for kept in cache:
        kept.update({name: x[:, :, :length] for name, x in kept.items()})


def positions_after(cache, idx):
    """The positions (time,) of tokens idx (batch, time)."""
    before = length_of(cache)
    return torch.arange(before, before + idx.shape[1], device=idx.device)


@torch.no_grad()
def following(model, idx, temperature=1.0, top_k=0, generator=None, vocab_size=None, cache=None):
    """
    Yields, without end, the tokens (batch, 1) that follow token numbers idx (batch, time). Each is
    computed from the last block_size tokens before it.

    temperature: 0 takes the most likely token; top_k: sample among the k most likely, 0: among all;
    generator: a torch.Generator; vocab_size: the tokenizer's, if the model's is larger; cache: one
    that has seen the first tokens of idx. It is used while all tokens fit into block_size; after
    that, each new token computes its whole window again.
    """
    cache, size = cache or new_cache(model), model.config.block_size
    while True:
        if idx.shape[1] <= size:
            x = model.hidden(idx[:, length_of(cache):], cache=cache)
        else:
            x = model.hidden(idx[:, -size:])
        logits = model.lm_head(x[:, -1])
        logits = logits[:, :vocab_size].float()  # (batch, vocab)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        yield token
        idx = torch.cat([idx, token], dim=1)
