"""
Weights in the formats of transformers, PEFT, nanoGPT and timm. The training scripts and sample.py
read them with this file; export.py writes such files.
"""

import dataclasses
import difflib
import os
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

import config
import prepare
from config import read_json, typed
from lowrank import merged_state_dict, named_layers
from model import GPTConfig, LlamaConfig, make_model
from ranks import load_weights, local, per_rank_tensors, rank_and_world, take
from run import TOKENIZER, as_checkpoint, is_run, load_tensors, put_layers

# -----------------------------------------------------------------------------
# transformers' layout: config.json and safetensors
#
# Names of tensors are ours, but the hub's files of GPT-2 leave out 'transformer.', and hold (in,
# out) where nn.Linear has (out, in).

FAMILIES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
            'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}
KEYS = {  # of config.json: ours
    GPTConfig: dict(
        n_positions='block_size', vocab_size='vocab_size', n_layer='n_layer', n_head='n_head',
        n_embd='n_embd', layer_norm_epsilon='norm_eps', tie_word_embeddings='tied'),
    LlamaConfig: dict(
        max_position_embeddings='block_size', vocab_size='vocab_size', hidden_size='n_embd',
        num_hidden_layers='n_layer', num_attention_heads='n_head', head_dim='head_size',
        num_key_value_heads='n_kv_head', intermediate_size='n_mlp', rms_norm_eps='norm_eps',
        tie_word_embeddings='tied', rope_theta='rope_base', rope_scaling='rope_scaling')}
# if a config.json lacks one of these, our default holds
MAY_LACK = {'norm_eps', 'tied', 'n_kv_head', 'head_size', 'rope_base', 'rope_scaling'}
# keys that change what is computed: the supported values; the first one holds if the key is missing
ONLY = {
    GPTConfig: dict(
        activation_function=('gelu_new', 'gelu_pytorch_tanh'), scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,),
        add_cross_attention=(False,), quantization_config=(None,)),
    LlamaConfig: dict(
        hidden_act=('silu', 'swish'), attention_bias=(False,), mlp_bias=(False,),
        attention_dropout=(0.0,), partial_rotary_factor=(1.0,), rope_interleaved=(False,),
        quantization_config=(None,))}
OUR_TOKENS = 'nanolowrank_tokens'  # what export.py says where there is no tokenizer.json
# keys that change nothing of what is computed
NO_MATTER = {OUR_TOKENS} | set("""
    _name_or_path _model_name_or_path architectures model_type torch_dtype dtype
    transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id
    unk_token_id pretraining_tp
    rope_parameters sliding_window use_sliding_window max_window_layers layer_types is_llama_config
    transformers.js_config n_ctx n_inner attn_pdrop embd_pdrop resid_pdrop task_specific_params
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    gradient_checkpointing output_attentions output_hidden_states return_dict""".split())


def need(good, path, key, value, supported):
    """ValueError where a value in the config.json at `path` is not good."""
    if not good:
        raise ValueError(f"'{path}' says {key}={repr(value)[:80]}, and what is supported is "
                         f'{supported}: give another model')


def with_rope(theirs, path):
    """A config.json of any version, with the keys of transformers 4 about rotary positions."""
    parts = [theirs.get(key) or {} for key in ('rope_parameters', 'rope_scaling')]
    rope = {**parts[0], **parts[1]}
    kinds = {str(part.get('rope_type', part.get('type', 'default'))) for part in parts}
    kinds.discard('default')
    scaling = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
    typed(rope, dict.fromkeys(scaling, float), path)
    is_llama3 = kinds == {'llama3'} and all((rope.get(key) or 0) > 0 for key in scaling)
    need(is_llama3 or not kinds, path, 'rope_parameters or rope_scaling', sorted(kinds),
         "rope_type 'default' or a whole 'llama3'")
    found = {**theirs, 'rope_scaling': None}
    found.update({key: rope[key] for key in ('rope_theta', 'partial_rotary_factor') if key in rope})
    if is_llama3:
        found['rope_scaling'] = {key: rope[key] for key in scaling}
    return found


def read_config(folder):
    """
    The GPTConfig or LlamaConfig that a folder's config.json stands for.

    Its block_size is the number of positions, or of tokens in a sliding window if that is smaller:
    up to there the window changes nothing. Dropout stays 0. ValueError: a value is not supported.
    FileNotFoundError.
    """
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{folder}' holds no config.json: give a model's folder in "
                                "transformers' layout")
    if is_run(folder):
        raise ValueError(f"'{folder}' is the folder of a run: give its best.pt or ckpt.pt")
    theirs = read_json(path, {'model_type': str, 'rope_parameters': dict, 'rope_scaling': dict,
                              'layer_types': list, 'sliding_window': int})
    family = theirs.get('model_type')
    need(family in list(FAMILIES), path, 'model_type', family, ', '.join(FAMILIES))
    kind = GPTConfig if family == 'gpt2' else LlamaConfig
    if kind is LlamaConfig:
        theirs = with_rope(theirs, path)
    known = {field.name: field for field in fields(kind)}
    typed(theirs, {key: known[name].type for key, name in KEYS[kind].items()}, path)
    ours = {}
    for key, name in KEYS[kind].items():
        field = known[name]
        value = theirs.get(key, field.default if name in MAY_LACK else None)
        if value is None:
            is_good = field.default is None
        else:
            is_good = field.type in (bool, dict) or value > 0
        need(is_good, path, key, value, f'{field.type.__name__}, numbers above 0')
        ours[name] = value
    for key, values in ONLY[kind].items():
        need(theirs.get(key, values[0]) in values, path, key, theirs.get(key), repr(values[0]))
    strange = [key for key, value in theirs.items()
               if value and key not in {*NO_MATTER, *KEYS[kind], *ONLY[kind]}]
    if strange:
        print(f"'{path}': {', '.join(strange)} not known here and passed over")
    if kind is GPTConfig:
        inner = theirs.get('n_inner')
        need(inner in (None, 4 * ours['n_embd']), path, 'n_inner', inner, 'four times n_embd')
        return GPTConfig(**ours)
    if family == 'qwen3':
        ours['head_size'] = ours['head_size'] or 128  # as transformers has it
    for layer in theirs.get('layer_types') or ():
        need(layer in ('full_attention', 'sliding_attention'), path, 'layer_types', layer,
             'full_attention')
    window = theirs.get('sliding_window', 4096 if family == 'mistral' else None)
    if window and (family == 'mistral' or theirs.get('use_sliding_window')):
        need(window > 0, path, 'sliding_window', window, 'int above 0')
        ours['block_size'] = min(ours['block_size'], window)
    return LlamaConfig(**ours, family=family)


def config_json(config):
    """What config.json says of a GPTConfig or LlamaConfig, a dict."""
    family = getattr(config, 'family', 'gpt2')
    said = {key: getattr(config, mine) for key, mine in KEYS[type(config)].items()}
    if family == 'gpt2':
        said.update(dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), config.dropout))
    elif config.rope_scaling:
        said['rope_scaling'] = {'rope_type': 'llama3', **config.rope_scaling}
    if family == 'mistral':
        said['sliding_window'] = None
    return {'architectures': [FAMILIES[family]], 'model_type': family, **said}


def transposed(name, x):
    """Transposes a linear layer's weight of GPT-2, from (in, out) of transformers' Conv1D to
    (out, in) of nn.Linear, or back. It returns any other tensor as it is."""
    is_linear = name.endswith(('.c_attn.weight', '.c_proj.weight', '.c_fc.weight'))
    if name.startswith('transformer.h.') and is_linear and x.dim() == 2:
        return x.T
    return x


def read_safetensors(path):
    """Yields (name, tensor) of a file. ValueError, FileNotFoundError: it is damaged, or missing."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{path}' is missing: fetch the folder again")
    try:
        with safe_open(path, 'pt') as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or no safetensors file ({str(error)[:80]}): fetch "
                         'it again') from None


def files_of_tensors(folder):
    """Returns the names of the files that hold a folder's tensors (those in its index, or
    model.safetensors). ValueError, FileNotFoundError: one is damaged, or missing."""
    index, file = (os.path.join(folder, f'model.safetensors{end}') for end in ('.index.json', ''))
    if os.path.isfile(index):
        found = read_json(index, {'weight_map': dict}).get('weight_map') or {}
        files = sorted({*map(str, found.values())})
        for file in files:
            if os.path.basename(file) != file:
                raise ValueError(f"'{index}' names '{file}', which is missing beside it: fetch the "
                                 'folder again')
        return files
    if not os.path.isfile(file):
        raise FileNotFoundError(f"'{folder}' holds no model.safetensors and no index of shards "
                                '(other formats are not read): fetch it again, or save the model '
                                'as safetensors')
    return ['model.safetensors']


def read_tensors(folder, config):
    """Yields (name, tensor), in our names and shapes, of a folder's safetensors."""
    gpt = isinstance(config, GPTConfig)
    for file in files_of_tensors(folder):
        for name, x in read_safetensors(os.path.join(folder, file)):
            if gpt and not name.startswith(('transformer.', 'lm_head.')):
                name = f'transformer.{name}'
            is_buffer = name.endswith(('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'))
            if not is_buffer and not (config.tied and name == 'lm_head.weight'):
                yield name, transposed(name, x) if gpt else x


def tensors_for_transformers(config, state):
    """Yields (name, tensor), in transformers' names and shapes, of a state dict of GPT or Llama.

    GPT-2 always has biases: where ours has none they are zeros."""
    gpt = isinstance(config, GPTConfig)
    for name, x in state.items():
        if config.tied and name == 'lm_head.weight':
            continue
        yield name, transposed(name, x) if gpt else x
        if gpt and not config.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
            name = name.removesuffix('weight') + 'bias'
            yield name, x.new_zeros(len(x))  # (out,), or (width,) of a norm


def from_nanogpt(checkpoint, path):
    """(GPTConfig, {name: tensor}) of what nanoGPT's train.py saves, without dropout, as in
    `read_config`."""
    numbers = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
    wanted = {**dict.fromkeys(numbers, int), 'bias': bool}
    found = typed(checkpoint['model_args'], wanted, path)
    for key in wanted:
        if found.get(key) is None:
            raise ValueError(f"'{path}' has no {key} among its model_args: give one that nanoGPT's "
                             'train.py wrote')
    state = {name.removeprefix('_orig_mod.'): x for name, x in checkpoint['model'].items()}
    state = {name: x for name, x in state.items() if not name.endswith('.attn.bias')}
    state.pop('lm_head.weight', None)  # it is the embedding
    print(f"'{path}': nanoGPT's GELU is the exact one, and here it is the tanh form of GPT-2: "
          'logits differ by about a thousandth')
    return GPTConfig(**{key: found[key] for key in wanted}), state


@torch.no_grad()
def fill(model, tensors, source, write=None):
    """
    Copies each (name, tensor) into the model's parameter of that name, which may hold no values yet
    (`to_empty`). Returns the model. ValueError: the tensors and the model do not go together.

    write(name, tensor): is called instead of the copy. A tied tensor comes once, and is written
    under each of its names.
    """
    model.tie()
    write = write or (lambda name, x: model.get_parameter(name).copy_(x))
    wanted, names = dict(model.named_parameters()), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, x in tensors:
        parameter = wanted.pop(name, None)
        if parameter is None:
            raise ValueError(f"'{source}' holds {name}, which a {type(model).__name__} of its "
                             'configuration lacks: give another model')
        if parameter.shape != x.shape or not x.is_floating_point():
            raise ValueError(f"'{source}' holds {name} of shape {tuple(x.shape)} ({x.dtype}), not "
                             f'{tuple(parameter.shape)} of floats: give a model whose weights are '
                             'those of its configuration')
        for name in names[parameter]:
            write(name, x)
    if wanted:
        raise ValueError(f"'{source}' lacks {next(iter(wanted))} and {len(wanted) - 1} more: fetch "
                         'it again')
    return model


# -----------------------------------------------------------------------------
# what init_from names, of text

PEFT_NONE = """
    use_dora use_rslora modules_to_save rank_pattern alpha_pattern lora_bias layer_replication
    trainable_token_indices target_parameters use_qalora use_bdlora alora_invocation_tokens
    arrow_config velora_config kasa_config use_gks corda_config eva_config loftq_config revision
    """.split()  # what is refused where an adapter sets it


def without_values(checkpoint, path):
    """The GPT or Llama of a checkpoint on the meta device, without heads."""
    if 'tokenizer' not in checkpoint:
        raise ValueError(f"'{path}' is the checkpoint of a ViT, which knows no text: give one of a "
                         'GPT or a LLaMA')
    with torch.device('meta'):
        return make_model(checkpoint['model_config'])


def of_a_run(checkpoint, path, dtype=None):
    """(configuration, state dict with heads merged, those in `dtype`) of a checkpoint of a GPT or
    LLaMA."""
    model = without_values(checkpoint, path)
    model.to(getattr(torch, checkpoint['settings']['param_dtype']))
    put_layers(model, checkpoint['settings'])
    # tensors stay mapped to the file: only merged weights take memory
    model.load_state_dict(checkpoint['model'], assign=True)
    state, shape = merged_state_dict(model, dtype=dtype), model.config
    if shape.tied and torch.equal(state['lm_head.weight'], model.embedding.weight):
        del state['lm_head.weight']
    else:  # heads on `logit` have made the output layer another one than the embedding
        shape.tied = False
    return shape, state


def folders_of(source):
    """Returns the folders with the tokenizer and other files of init_from's weights: one, or that
    of an adapter and then those of its base."""
    if os.path.isfile(source):  # of a run
        return [os.path.join(os.path.dirname(source), 'tokenizer')]
    folder = prepare.hub_folder(source, '*.json', '*.safetensors', '*.jinja')
    about = os.path.join(folder, 'adapter_config.json')
    if os.path.isfile(about):
        base = read_json(about, {'base_model_name_or_path': str}).get('base_model_name_or_path')
        return [folder, *folders_of(base or '')]
    return [folder]


def read_adapter(folder):
    """({name: factor} of PEFT's LoRA in a folder, its adapter_config.json, the path of its
    factors). ValueError: what PEFT can do and we do not read, by its key."""
    about = read_json(os.path.join(folder, 'adapter_config.json'),
                      {'r': int, 'lora_alpha': float, 'peft_type': str, 'bias': str})
    supported = {key: not about.get(key) for key in PEFT_NONE} | {
        'peft_type': about.get('peft_type') == 'LORA', 'bias': about.get('bias', 'none') == 'none',
        'init_lora_weights':  # others change the base
            about.get('init_lora_weights', True) in (True, False, 'gaussian', 'orthogonal', 'eva')}
    for key in ('r', 'lora_alpha'):
        supported[key] = (about.get(key) or 0) > 0
    for key in supported:
        if not supported[key]:
            raise ValueError(f"'{folder}/adapter_config.json' says {key}={about.get(key)!r}, which "
                             'is not supported: merge it by PEFT first')
    path = os.path.join(folder, 'adapter_model.safetensors')
    factors = {name.removeprefix('base_model.model.'): x for name, x in read_safetensors(path)}
    whole = [name for name in factors if not name.endswith(('.lora_A.weight', '.lora_B.weight'))]
    if whole:  # as PEFT saves where the vocabulary grew, or heads are on embeddings
        raise ValueError(f"'{path}' holds {whole[0]}, which is no LoRA of a linear layer: merge it "
                         'by PEFT first')
    return factors, about, path


def with_adapter(folder, shape, tensors):
    """Returns (configuration, iterable of (name, tensor)) of a base plus PEFT's LoRA in `folder`,
    added in float32. A LoRA on a tied output layer unties it: the embedding stays as it is."""
    factors, about, path = read_adapter(folder)
    if shape.tied and any(name.startswith('lm_head.') for name in factors):
        shape, tensors = dataclasses.replace(shape, tied=False), parted(tensors)
    return shape, added(tensors, factors, about, path)


def parted(tensors):
    """(name, tensor) of a tied model, and the embedding once more as its output layer."""
    for name, x in tensors:
        yield name, x
        if name.endswith(('wte.weight', 'embed_tokens.weight')):
            yield 'lm_head.weight', x


def added(tensors, factors, about, path):
    """Yields (name, tensor) with the LoRA {name: factor} of a file added. ValueError: it is one of
    another base, with other layers or fewer."""
    targets = about.get('target_modules')  # names, or the ends of names; or a regular expression
    may_lack = not isinstance(targets, list) or about.get('layers_to_transform') is not None \
        or about.get('exclude_modules')
    for name, x in tensors:
        layer, r = name.removesuffix('weight'), about['r']
        A = factors.pop(f'{layer}lora_A.weight', None)  # (r, in)
        B = factors.pop(f'{layer}lora_B.weight', None)  # (out, r)
        if A is not None and B is not None and len(A) == B.shape[1] == r:
            x = torch.addmm(x.float(), B.float(), A.float(), alpha=about['lora_alpha'] / r)
        elif A is not None or B is not None:
            raise ValueError(f"'{path}' has no A and B of rank r={r} for {name}: fetch it again")
        elif not may_lack and any(f'.{layer}'.endswith(f'.{target}.') for target in targets):
            raise ValueError(f"'{path}' has nothing for {name}, which its target_modules name: it "
                             'belongs to a base with fewer layers, check base_model_name_or_path')
        yield name, x
    if factors:
        raise ValueError(f"'{path}' holds {next(iter(factors))}, which the base has no weight for: "
                         'check base_model_name_or_path')


@torch.no_grad()
def load_heads(model, settings, adapter):
    """Loads an adapter of `read_adapter` into the heads of a model: each layer's LoRA is split into
    heads, and a rank loads its part. ValueError: its layers, r or lora_alpha are other ones."""
    factors, about, path = adapter
    heads, rank, layers = settings['heads'], settings['rank'], named_layers(model)
    saved = {name.rpartition('.lora_')[0] for name in factors}
    if odd := saved ^ layers.keys():
        raise ValueError(f"'{path}' has heads on other layers than this run, such as {min(odd)}: "
                         'set lowrank as it was, or frozen_bits=None to merge them')
    if (about['r'], about['lora_alpha']) != (heads * rank, settings['alpha']):
        raise ValueError(f"'{path}' has r={about['r']}, lora_alpha={about['lora_alpha']:g}, and "
                         f"here heads times rank is {heads * rank}, alpha {settings['alpha']:g}: "
                         'set the same, or frozen_bits=None to merge it')
    per_rank = per_rank_tensors(layers.values())
    for name, layer in layers.items():
        A, B = (factors.get(f'{name}.lora_{which}.weight') for which in 'AB')
        if A is None or B is None or len(A) != B.shape[1] or len(A) != about['r']:
            raise ValueError(f"'{path}' has no A and B of rank r={about['r']} for {name}: fetch it "
                             'again')
        A = A.unflatten(0, (heads, rank))  # (heads, r, n)
        B = B.unflatten(1, (heads, rank))  # (m, heads, r)
        for p, x in ((layer.A, A), (layer.B, B.transpose(0, 1))):
            local(p).copy_(take(x, p, per_rank))


def load_file(path):
    """What a .pt file holds, see run.load_tensors. ValueError: it is one of a folder's files."""
    if path.endswith(('.safetensors', '.json')):
        raise ValueError(f"'{path}' is one file of a model, which other files describe: give its "
                         'folder')
    return load_tensors(path)


def shape_of(source):
    """The configuration of what `read_weights` would read, without tensors of the hub."""
    if os.path.isfile(source) or source.endswith('.pt'):
        loaded = load_file(source)
        if isinstance(loaded, dict) and 'model_args' in loaded:
            return from_nanogpt(loaded, source)[0]
        return without_values(as_checkpoint(loaded, source), source).config
    folder = prepare.hub_folder(source, 'config.json', 'adapter_config.json')
    about = os.path.join(folder, 'adapter_config.json')
    if os.path.isfile(about):
        return shape_of(read_json(about).get('base_model_name_or_path') or '')
    return read_config(folder)


def read_weights(source, frozen_bits=None):
    """
    Returns what init_from names: (configuration, iterable of (name, tensor), the name of its tokens
    or None).

    source: a folder of transformers or PEFT, or its name on the hub, read tensor by tensor; or a
    .pt file of our run, whose heads are merged, or of nanoGPT. frozen_bits: the bits that the
    weights will be stored in, or None. ValueError, FileNotFoundError: say what is wrong.
    """
    if os.path.isfile(source) or source.endswith('.pt'):
        loaded = load_file(source)
        if isinstance(loaded, dict) and 'model_args' in loaded:
            shape, state = from_nanogpt(loaded, source)
            return shape, state.items(), None
        checkpoint = as_checkpoint(loaded, source)
        refuse_to_code_again(checkpoint, source, frozen_bits)
        shape, state = of_a_run(checkpoint, source)
        return shape, state.items(), checkpoint['tokenizer']
    folder, *rest = folders_of(source)
    if rest:
        shape, tensors, tokens = read_weights(rest[0])
        return *with_adapter(folder, shape, tensors), tokens
    shape = read_config(folder)
    about = read_json(os.path.join(folder, 'config.json'), {OUR_TOKENS: str})
    tokens = about.get(OUR_TOKENS) if about.get(OUR_TOKENS) in ('bytes', 'gpt2') else None
    if os.path.isfile(os.path.join(folder, 'tokenizer.json')):
        tokens = prepare.HubTokenizer(folder).name
    return shape, read_tensors(folder, shape), tokens


def refuse_to_code_again(checkpoint, path, frozen_bits):
    """ValueError: heads would be merged into weights in few bits, and the sum coded again."""
    if frozen_bits and checkpoint['settings']['frozen_bits']:
        raise ValueError(f"'{path}' has weights in {frozen_bits} bits and heads beside them, which "
                         'coded again together would be others: set frozen_bits=None, or begin '
                         'from what export.py --adapter=True makes of it')


def base_of(source, frozen_bits):
    """Returns (folder of an adapter or None, what the weights are read from) of an init_from. With
    frozen_bits an adapter is kept apart: it was trained on the weights in few bits."""
    if not frozen_bits or os.path.isfile(source):
        return None, source
    folder, *rest = folders_of(source)
    about = os.path.join(folder, 'adapter_config.json')
    if not rest:
        return None, source
    return folder, read_json(about)['base_model_name_or_path']


def refuse_shape(shape, kind, settings):
    """ValueError: the configuration of init_from is of another kind, or has fewer positions than
    block_size."""
    source, many = settings['init_from'], settings['block_size']
    if not isinstance(shape, kind):
        what = 'a LLaMA: train it by train_llama.py'
        if isinstance(shape, GPTConfig):
            what = 'a GPT-2: train it by train_gpt.py'
        raise ValueError(f"init_from='{source}' is {what}")
    if many > shape.block_size:
        raise ValueError(f"block_size={many} is more than the {shape.block_size} positions (or "
                         f"their window) of '{source}': set a smaller one")


def read_for(settings, kind):
    """(configuration of that kind, iterable of (name, tensor), heads for `load_heads` or None) of a
    training script's init_from, see `read_weights`. ValueError: it does not go with the settings,
    or with the tokens of the data."""
    source, dataset = settings['init_from'], settings['dataset']
    adapter, base = base_of(source, settings['frozen_bits'])
    heads = read_adapter(adapter) if adapter else None
    shape, tensors, tokens = read_weights(base, settings['frozen_bits'])
    refuse_shape(shape, kind, settings)
    held = prepare.read_meta(Path(settings['data_dir'], dataset, 'meta.json'))['tokenizer']
    if tokens is None:
        print(f"'{source}' does not say what its tokens are: that those of data set '{dataset}' "
              f'({held}) '
              'are the same is up to you')
    elif tokens != held:
        raise ValueError(f"data set '{dataset}' has other tokens ({held}) than the weights "
                         f"({tokens}): prepare it by 'prepare.py ... --tokenizer' with the folder "
                         'of the weights')
    return shape, tensors, heads


def carry_along(settings):
    """Copies the files of the data's tokenizer, or else of loaded weights', and the config.json of
    the weights into tokenizer/ of a run that begins, and writes into its base.json what the weights
    are read from."""
    if settings['init_from'] == 'resume' or settings['eval_only']:
        return
    sources, base = [], settings['init_from']
    if base != 'scratch':
        sources = folders_of(base)[::-1]
        base = base_of(base, settings['frozen_bits'])[1]
    of_data = Path(settings['data_dir'], settings['dataset'], 'tokenizer')
    adapted = base != 'scratch' and len(folders_of(base)) > 1
    about = {'init_from': base, 'adapted': adapted}
    with config.written_beside(Path(settings['out_dir'], 'tokenizer'), TOKENIZER) as folder:
        # one set: with the same tokens a model may have no chat template, and its data one
        prepare.carry([of_data] if (of_data / 'tokenizer.json').is_file() else sources, folder)
        prepare.carry(sources, folder, ['config.json'])
        config.write_json(folder / 'base.json', about)


# -----------------------------------------------------------------------------
# a ViT of timm; functions import timm when they are called, as that takes longer than torch

SHAPE = {  # settings of ours: timm's arguments
    'img_size': 'img_size', 'patch_size': 'patch_size', 'n_layer': 'depth', 'n_embd': 'embed_dim',
    'n_head': 'num_heads'}
# how images are cropped and resized; weights of timm bring their own values
LOOK = {'crop_pct': 1.0, 'interpolation': 'bicubic'}


def create_vit(shape, num_classes, weights=False, path=''):
    """Returns timm's model of `shape` (settings by name, and LOOK). weights: False draws them, True
    loads those of timm's hub; or a state dict in timm's form from the file at `path`. timm fits
    them to another image or patch size. ValueError: name, shape, weights do not go together."""
    import timm
    name = shape['model']
    # a name with a colon is a place, such as hf-hub:timm/...
    if ':' not in name and not timm.is_model(name):
        known = timm.list_models(module='vision_transformer')
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f'model={name!r} is not known to timm {timm.__version__}: did you mean '
                         f"'{near}'?")
    changes = {theirs: shape[ours] for ours, theirs in SHAPE.items() if shape[ours] is not None}
    overlay = {key: shape[key] for key in LOOK if key in shape}
    if path:  # with as many classes as the model nothing is dropped; a source would come first
        overlay.update(state_dict=weights, num_classes=num_classes, source='')
    try:
        vit = timm.create_model(name, pretrained=bool(weights), num_classes=num_classes,
                                pretrained_cfg_overlay=overlay, **changes)
    except OSError as error:
        raise ValueError(f"timm's weights of {name!r} cannot be downloaded ({config.said(error)}): "
                         'connect, or set init_from to a file of them '
                         '(model.safetensors)') from None
    except (RuntimeError, TypeError, AssertionError, AttributeError, LookupError,
            ValueError) as error:
        what = f"the weights '{path}'" if path else changes or 'the pretrained weights'
        raise ValueError(f'model={name!r} does not go with {what} ({config.said(error)}): set '
                         'model, n_layer, n_embd, n_head, patch_size as they belong '
                         'together') from None
    if not isinstance(vit, timm.models.VisionTransformer):  # others compute around their linears
        raise ValueError(f'model={name!r} is no VisionTransformer of timm: set one like '
                         'vit_base_patch16_224')
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vit.modules()):
        raise ValueError(f'model={name!r} has BatchNorm, whose averages would move while it is '
                         'frozen: set one like vit_base_patch16_224')
    if 0 in vit.patch_embed.grid_size:
        embed = vit.patch_embed
        raise ValueError(f'an image of {embed.img_size} has no patch of {embed.patch_size} pixels: '
                         'raise img_size or lower patch_size')
    vit.pretrained_cfg.pop('state_dict', None)  # timm keeps a copy too
    return vit


class QKV(nn.Module):
    """timm's fused layer of queries, keys and values as three, so that each can have heads."""

    def __init__(self, fused):
        super().__init__()
        rows, state = fused.out_features // 3, fused.state_dict()
        for i, name in enumerate('qkv'):
            part = nn.Linear(fused.in_features, rows, fused.bias is not None, device='meta')
            own = {key: x[i * rows:(i + 1) * rows].clone() for key, x in state.items()}
            part.load_state_dict(own, assign=True)
            self.add_module(name, part)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def split_qkv(vit):
    """Puts a QKV in the place of every fused linear layer, in place."""
    for name, module in [*vit.named_modules()]:
        if name.endswith('.qkv') and type(module) is nn.Linear:
            vit.set_submodule(name, QKV(module))


def fuse_qkv(state):
    """The state dict of a model after `split_qkv` as it was before."""
    state = dict(state)
    for name in [name for name in state if '.qkv.q.' in name]:
        parts = [state.pop(name.replace('.qkv.q.', f'.qkv.{part}.')) for part in 'qkv']
        state[name.replace('.qkv.q.', '.qkv.')] = torch.cat(parts)
    return state


def put_heads(vit, settings, worker=0, workers=1):
    """See run.put_layers; where targets name q, k or v, qkv is split before."""
    if not {'q', 'k', 'v'}.isdisjoint(settings['lowrank'].split(',')):
        split_qkv(vit)
    put_layers(vit, settings, worker, workers)


def merged_vit(checkpoint):
    """The state dict of a checkpoint's model with its heads merged, as timm has it."""
    s = checkpoint['settings']
    full = create_vit(checkpoint['model_config'], len(checkpoint['classes']))
    full.to(getattr(torch, s['param_dtype']))
    put_heads(full, s)
    load_weights(full, named_layers(full), checkpoint['model'])
    return fuse_qkv(merged_state_dict(full))


def read_vit(path, shape, classes, keep=False, frozen_bits=None):
    """Returns (shape, state dict in timm's form) of a file of timm, or of our best.pt with heads
    merged. A best.pt replaces what is None in `shape`, and adds LOOK. The classifier stays if it
    has the same classes (in files of timm, which do not name them: as many classes); otherwise it
    is drawn anew, or refused (ValueError) where `keep` is True."""
    import timm
    with open(path, 'rb') as file:
        zipped = file.read(2) == b'PK'
    found = load_tensors(path) if zipped else {}
    if isinstance(found, dict) and 'model_config' in found:
        checkpoint = as_checkpoint(found, path)
        if 'classes' not in checkpoint:
            raise ValueError(f"'{path}' is the checkpoint of a GPT or a LLaMA: give one of a ViT")
        refuse_to_code_again(checkpoint, path, frozen_bits)
        saved, known = checkpoint['model_config'], checkpoint['classes']
        for key in ('model', 'n_layer', 'n_embd', 'n_head'):
            if shape[key] not in (None, saved[key]):
                raise ValueError(f"'{path}' is a checkpoint of {key}={saved[key]!r}, this run says "
                                 f'{shape[key]!r}: set the same, or choose another init_from')
        given = {key: value for key, value in shape.items() if value is not None}
        shape = {**LOOK, **saved, **given}
        weights, same = merged_vit(checkpoint), known == list(classes)
        differ = [name for name in (*known, *classes) if (name in known) != (name in classes)]
        differ = f" (other names or another order: {', '.join((differ or known)[:3])})"
    else:
        try:
            weights = timm.models.load_state_dict(path, weights_only=True)
        except Exception as error:  # of pickle, zipfile, safetensors
            raise ValueError(f"'{path}' is damaged or holds no weights ({config.said(error)}): "
                             'check init_from') from None
        known, differ = weights.get('head.weight', ()), ''
        same = len(known) == len(classes)
    if not len(known) and keep:
        raise ValueError(f"'{path}' has no classifier, 'head.weight': train first")
    if not same and keep:
        raise ValueError(f"the classifier of '{path}' knows {len(known)} classes, and not the "
                         f'{len(classes)} of the data{differ}: evaluate it on its own data, or '
                         'train first')
    if not same:  # as timm draws it
        if rank_and_world()[0] == 0:
            print(f"'{path}': its classifier is of {len(known)} classes, the data have "
                  f'{len(classes)}{differ}: it is drawn anew')
        norms = [x.shape[0] for name, x in weights.items()
                 if name.endswith('norm.weight') and not name.startswith('patch_embed.')]
        width = (norms or [1])[-1]
        # those that were distilled have two
        for head in ['head', *({'head_dist'} & {name.split('.')[0] for name in weights})]:
            drawn = nn.init.trunc_normal_(torch.empty(len(classes), width), std=0.02)
            weights.update({f'{head}.weight': drawn, f'{head}.bias': torch.zeros(len(classes))})
    return shape, weights
