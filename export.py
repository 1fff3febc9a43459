"""
A run's model as others read it: transformers, PEFT (its heads alone), timm (a ViT).

$ python export.py --out_dir=out/mine --to=mine-hf
$ python export.py --out_dir=out/mine --to=mine-lora --adapter=True

And the other way, for the training scripts and sample.py: `read_weights`.
"""

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
to = ''  # the folder to write
adapter = False  # True: the heads alone, as PEFT's LoRA of the weights that the run began from
dtype = 'auto'  # of the weights written: 'auto' (the run's), 'float32', 'bfloat16', 'float16', 'float64'
overwrite = False  # True: replace a folder of an earlier export
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    settings = config.load(globals(), defaults, sys.argv[1:])

import torch
import torch.nn.functional as F

import prepare
from config import read_json
from lowrank import merged_state_dict, side_by_side
from model import (GPTConfig, config_json, from_nanogpt, make_model, read_config, read_safetensors,
                   read_tensors, tensors_for_transformers)
from run import as_checkpoint, load_checkpoint, load_tensors, put_layers

SHARD = 5e9  # bytes of a safetensors file, at most
PEFT_NONE = """
    use_dora use_rslora modules_to_save rank_pattern alpha_pattern lora_bias layer_replication
    trainable_token_indices target_parameters use_qalora use_bdlora alora_invocation_tokens arrow_config
    velora_config kasa_config use_gks corda_config eva_config loftq_config revision
    """.split()  # what is refused where an adapter sets it

# -----------------------------------------------------------------------------
# in

def of_a_run(checkpoint, path, dtype=None):
    """(configuration, state dict with heads merged, those in `dtype`) of a checkpoint of a GPT or LLaMA."""
    if 'tokenizer' not in checkpoint:
        raise ValueError(f"'{path}' is the checkpoint of a ViT, which knows no text: give one of a GPT or a "
                         'LLaMA')
    with torch.device('meta'):
        model = make_model(checkpoint['model_config'])
    put_layers(model, checkpoint['settings'])
    model.load_state_dict(checkpoint['model'], assign=True)  # mapped: only what is merged takes memory
    state, shape = merged_state_dict(model, dtype=dtype), model.config
    if shape.tied and torch.equal(state['lm_head.weight'], model.embedding.weight):
        del state['lm_head.weight']
    else:  # heads on `logit` part the two
        shape.tied = False
    return shape, state


def folders_of(source):
    """Folders with what lies beside the weights of init_from; that of an adapter's base comes last."""
    if os.path.isfile(source):  # of a run
        return [os.path.join(os.path.dirname(source), 'tokenizer')]
    folder = prepare.hub_folder(source, '*.json', '*.safetensors', '*.jinja')
    about = os.path.join(folder, 'adapter_config.json')
    if os.path.isfile(about):
        base = read_json(about, {'base_model_name_or_path': str}).get('base_model_name_or_path')
        return [folder, *folders_of(base or '')]
    return [folder]


def with_adapter(folder, shape, tensors):
    """(configuration, iterable of (name, tensor)) of a base with PEFT's LoRA of a folder merged into it, in
    float32; a LoRA of a tied output layer parts it from the embedding, which stays.

    ValueError: what PEFT can do and we do not read, by its key."""
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
            raise ValueError(f"'{folder}/adapter_config.json' says {key}={about.get(key)!r}, which is not "
                             'supported: merge it by PEFT first')
    path = os.path.join(folder, 'adapter_model.safetensors')
    factors = {name.removeprefix('base_model.model.'): x for name, x in read_safetensors(path)}
    if shape.tied and any(name.startswith('lm_head.') for name in factors):
        shape, tensors = dataclasses.replace(shape, tied=False), parted(tensors)
    return shape, _added(tensors, factors, about, path)


def parted(tensors):
    """(name, tensor) of a tied model, and the embedding once more as its output layer."""
    for name, x in tensors:
        yield name, x
        if name.endswith(('wte.weight', 'embed_tokens.weight')):
            yield 'lm_head.weight', x


def _added(tensors, factors, about, path):
    """Yields (name, tensor) with the LoRA {name: factor} of a file added."""
    for name, x in tensors:
        A, B = (factors.pop(name.removesuffix('weight') + f'lora_{factor}.weight', None) for factor in 'AB')
        if (A is None) != (B is None) or A is not None and (len(A), B.shape[1]) != (about['r'], about['r']):
            raise ValueError(f"'{path}' has no A and B of rank r={about['r']} for {name}: fetch it again")
        if A is not None:
            x = torch.addmm(x.float(), B.float(), A.float(), alpha=about['lora_alpha'] / about['r'])
        yield name, x
    if factors:
        raise ValueError(f"'{path}' holds {next(iter(factors))}, which the base has no weight for: check "
                         'base_model_name_or_path')


def read_weights(source):
    """
    What init_from names: (configuration, iterable of (name, tensor), the name of its tokens or None).

    source: a folder of transformers' or of PEFT's, or its name on the hub, read tensor by tensor; a .pt of a
    run of ours, whose heads are merged, or of nanoGPT's. ValueError, FileNotFoundError: say what is wrong.
    """
    if os.path.isfile(source) or source.endswith('.pt'):
        loaded = load_tensors(source)
        if isinstance(loaded, dict) and 'model_args' in loaded:
            shape, state = from_nanogpt(loaded, source)
            return shape, state.items(), None
        checkpoint = as_checkpoint(loaded, source)
        shape, state = of_a_run(checkpoint, source)
        return shape, state.items(), checkpoint['tokenizer']
    folder, *rest = folders_of(source)
    if rest:
        shape, tensors, tokens = read_weights(rest[0])
        return *with_adapter(folder, shape, tensors), tokens
    shape = read_config(folder)
    known = os.path.isfile(os.path.join(folder, 'tokenizer.json'))
    return shape, read_tensors(folder, shape), prepare.HubTokenizer(folder).name if known else None


def read_for(settings, kind):
    """(configuration of that kind, iterable of (name, tensor)) of a training script's init_from, see
    `read_weights`. ValueError: it does not go with the settings, or with the tokens of the data."""
    source, many, dataset = settings['init_from'], settings['block_size'], settings['dataset']
    shape, tensors, tokens = read_weights(source)
    if not isinstance(shape, kind):
        what, script = ('LLaMA', 'train_llama.py') if kind is GPTConfig else ('GPT-2', 'train_gpt.py')
        raise ValueError(f"init_from='{source}' is a {what}: train it by {script}")
    if many > shape.block_size:
        raise ValueError(f"block_size={many} is more than the {shape.block_size} positions (or their window) "
                         f"of '{source}': set a smaller one")
    held = prepare.read_meta(Path(settings['data_dir'], dataset, 'meta.json'))['tokenizer']
    if tokens is None:
        print(f"'{source}' does not say what its tokens are: that those of data set '{dataset}' ({held}) are "
              'the same is up to you')
    elif tokens != held:
        raise ValueError(f"data set '{dataset}' has other tokens ({held}) than the weights ({tokens}): "
                         "prepare it by 'prepare.py ... --tokenizer' with the folder of the weights")
    return shape, tensors


def carry_along(settings):
    """Copies into tokenizer/ of a run that begins what belongs to its tokens and to loaded weights,
    and notes the name of these."""
    if settings['init_from'] == 'resume' or settings['eval_only']:
        return
    target, sources = Path(settings['out_dir'], 'tokenizer'), []
    if settings['init_from'] != 'scratch':
        sources = folders_of(settings['init_from'])[::-1]
    prepare.carry([*sources, Path(settings['data_dir'], settings['dataset'], 'tokenizer')], target,
                  (*prepare.TOKENIZER, 'config.json'))
    if target.exists():
        about = {'init_from': settings['init_from'], 'adapted': len(sources) > 1}
        config.write_json(target / 'base.json', about)


# -----------------------------------------------------------------------------
# out

def write_tensors(folder, tensors, dtype):
    """Writes (name, tensor) in a dtype as model.safetensors, or as shards and their index, one by one."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    tensors = dict(tensors)
    sizes = {name: torch.empty_like(x, dtype=dtype, device='meta') for name, x in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        parts = {name: tensors[name].to(dtype).contiguous() for name in names}
        save_file(parts, f'{folder}/{file}', {'format': 'pt'})
    if plan.is_sharded:
        config.write_json(f'{folder}/model.safetensors.index.json',
                          {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename})


def write_transformers(run, checkpoint, folder, dtype):
    """The merged model of a checkpoint, its tokenizer, and the config.json that it came with, or ours."""
    shape, state = of_a_run(checkpoint, run, dtype)
    write_tensors(folder, tensors_for_transformers(shape, state), dtype)
    prepare.carry([run], Path(folder))
    tokens, dtype = prepare.tokenizer(checkpoint['tokenizer'], run), str(dtype).removeprefix('torch.')
    if not isinstance(tokens, prepare.HubTokenizer):
        where = "that of gpt2 lies on the hub, as 'gpt2'"
        print('no tokenizer.json is written:', where if tokens.name == 'gpt2' else 'bytes have none')
    if (run / 'config.json').is_file():
        said = read_json(run / 'config.json')
    else:
        said = {**config_json(shape), 'bos_token_id': tokens.eot_token, 'eos_token_id': tokens.eot_token}
    said |= {'tie_word_embeddings': shape.tied, 'torch_dtype': dtype, 'dtype': dtype}  # transformers 4, and 5
    config.write_json(f'{folder}/config.json', said)


def write_peft(run, checkpoint, folder, dtype):
    """The heads of a checkpoint as one LoRA: (s / H) sum_h B_h A_h = alpha / (H r) [B_1 ...] [A_1; ...].
    What heads that train on over merges (LTE) have put into W telescopes to it. Thirds of a fused projection
    are one LoRA of it. A ViT's classifier is saved whole. On a tied output layer PEFT's LoRA is exact beside
    the weight; merged by PEFT it would move the embedding as well. ValueError: there is none."""
    from safetensors.torch import save_file
    s, state, text = checkpoint['settings'], checkpoint['model'], 'tokenizer' in checkpoint
    about = read_json(run / 'base.json') if (run / 'base.json').is_file() else {}
    base = about.get('init_from') if text else s['init_from']
    layers = {}  # of the base: layers of ours
    for name in (name.removesuffix('.A') for name in state if name.endswith('.A')):
        fused, _, third = name.rpartition('.')
        if third in ('q', 'k', 'v') and fused.endswith('.qkv'):  # of a ViT, see train_vit.QKV
            layers[fused] = [f'{fused}.{third}' for third in 'qkv']
        elif text or not name.startswith('head'):  # as a distilled ViT's other classifier is called, too
            layers[name] = [name]
    for wrong, sentence in (
            (not layers, 'the run has no heads in its blocks'),
            (s['factors'] == 'basis' or s['merge_reset'],
             'GaLore, GaLoLTE and ReLoRA train what they merge into the weights, and no heads hold it'),
            (s['train'] == 'all', "the run trains more than its heads (train='all')"),
            (about.get('adapted'),
             f'the run began from {base!r}, an adapter itself, and PEFT loads one on a base'),
            (base in (None, 'scratch', 'resume') or text and os.path.isfile(base),
             f'the run began from {base!r}, and an adapter belongs to weights that others can load')):
        if wrong:
            raise ValueError(f'{sentence}: export the merged model, without --adapter')
    pairs, parts = {}, {}
    for name, ours in layers.items():
        A, B = zip(*(heads_side_by_side(state, part) for part in ours))
        pairs[name] = torch.cat(A), torch.block_diag(*B)  # (R, n), (m, R): R = H r, of k thirds k H r
    R = max(len(A) for A, _ in pairs.values())
    for name, (A, B) in pairs.items():  # of one rank: the rest is zeros
        A, B = F.pad(A, (0, 0, 0, R - len(A))), F.pad(B, (0, R - len(A)))
        parts[f'base_model.model.{name}.lora_A.weight'] = A.to(dtype).contiguous()
        parts[f'base_model.model.{name}.lora_B.weight'] = B.to(dtype).contiguous()
    whole = {}
    if not text:
        import train_vit
        whole = {name: x.to(dtype).contiguous() for name, x in train_vit.merged(checkpoint).items()
                 if name.startswith('head')}
    parts |= {f'base_model.model.{name}': x for name, x in whole.items()}
    linears = [name[:-7] for name, x in state.items() if name.endswith('.weight') and x.dim() > 1]
    last = {name.split('.')[-1] for name in layers}  # short names, where they mean no other layer
    short = all(name in layers for name in linears if name.split('.')[-1] in last)
    config.write_json(f'{folder}/adapter_config.json', {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM' if text else None, 'inference_mode': True,
        'base_model_name_or_path': os.path.abspath(base) if os.path.exists(base) else base,
        'r': R, 'lora_alpha': s['alpha'] * R / (s['heads'] * s['rank']), 'lora_dropout': 0.0, 'bias': 'none',
        'fan_in_fan_out': text and 'n_mlp' not in checkpoint['model_config'],  # GPT-2's Conv1D
        'target_modules': sorted(last) if short else list(layers),
        'modules_to_save': sorted({name.split('.')[0] for name in whole}) or None})
    save_file(parts, f'{folder}/adapter_model.safetensors', {'format': 'pt'})
    prepare.carry([run], Path(folder))


def heads_side_by_side(state, name):
    """A (H r, n), B (m, H r) of a layer; of one without heads (0, n), (m, 0)."""
    W = state[f'{name}.weight'][None]  # (1, m, n)
    A, B = state.get(f'{name}.A', W[:, :0]), state.get(f'{name}.B', W[:, :, :0])
    return side_by_side(A.mT).mT, side_by_side(B)


def write_timm(checkpoint, folder, dtype):
    """A ViT with its heads merged, for timm.create_model('local-dir:FOLDER', pretrained=True).

    timm 1.0.20 to 24 cannot read it."""
    import timm

    import train_vit
    shape, classes = checkpoint['model_config'], checkpoint['classes']
    plain = train_vit.create(shape, len(classes))
    plain.load_state_dict(train_vit.merged(checkpoint))
    changes = {theirs: shape[ours] for ours, theirs in train_vit.SHAPE.items() if shape[ours] is not None}
    about = {'label_names': classes, 'num_classes': len(classes), 'model_args': changes}
    timm.models.save_for_hf(plain.to(dtype), folder, model_config=about, safe_serialization=True)


def main(settings):
    s = SimpleNamespace(**settings)
    with config.refusals():
        checkpoint = load_checkpoint(f'{s.out_dir}/{s.checkpoint}')
        dtype = getattr(torch, checkpoint['settings']['param_dtype'] if s.dtype == 'auto' else s.dtype)
        run, text = Path(s.out_dir, 'tokenizer'), 'tokenizer' in checkpoint
        if not s.to:
            raise ValueError("to='' names no folder to write: set --to=FOLDER")
        if os.path.exists(s.to) and not s.overwrite:
            raise ValueError(f"'{s.to}' is already there: choose another --to, or replace it by "
                             '--overwrite=True')
        with config.written_beside(s.to, '.export_of_nanolowrank') as folder:
            if s.adapter or text:
                (write_peft if s.adapter else write_transformers)(run, checkpoint, folder, dtype)
            else:
                write_timm(checkpoint, folder, dtype)
    print(f"'{s.to}' holds {'the heads' if s.adapter else 'the model'} of {s.out_dir}/{s.checkpoint}, step "
          f"{checkpoint['step']}")


if __name__ == '__main__':
    main(settings)
