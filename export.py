"""
A run's model as others read it: transformers, PEFT (its heads alone), timm (a ViT).

$ python export.py --out_dir=out/mine --to=mine-hf
$ python export.py --out_dir=out/mine --to=mine-lora --adapter=True

The other way: hub.py.
"""

import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
to = ''  # the folder to write
adapter = False  # True: the heads alone, as PEFT's LoRA of the weights that the run began from
check = False  # True: of text, compare logits and losses before and after the merge
dtype = 'auto'  # of what is written: the run's, or 'float32', 'bfloat16', 'float16', 'float64'
overwrite = False  # True: replace a folder of an earlier export
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    settings = config.load(globals(), defaults, sys.argv[1:])

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

import prepare
from config import read_json
from hub import (OUR_TOKENS, SHAPE, config_json, create_vit, fill, merged_vit, of_a_run,
                 read_weights, tensors_for_transformers)
from lowrank import averaged_heads, side_by_side
from model import make_model
from run import load_checkpoint, load_tensors, put_layers

SHARD = 5e9  # bytes of a safetensors file, at most

# -----------------------------------------------------------------------------
# out

def write_tensors(folder, tensors, dtype):
    """Writes (name, tensor) in a dtype as model.safetensors, or as shards and their index, one by
    one."""
    tensors = dict(tensors)
    sizes = {name: torch.empty_like(x, dtype=dtype, device='meta') for name, x in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        parts = {name: tensors[name].to(dtype).contiguous() for name in names}
        save_file(parts, f'{folder}/{file}', {'format': 'pt'})
        open_to_others(folder, file)
    if plan.is_sharded:
        config.write_json(f'{folder}/model.safetensors.index.json',
                          {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename})


def open_to_others(folder, file):
    """Gives a file of safetensors, which its owner alone may read, the rights of its folder."""
    os.chmod(f'{folder}/{file}', os.stat(folder).st_mode & 0o666)


def write_transformers(run, checkpoint, folder, dtype):
    """Writes the merged model of a checkpoint, its tokenizer, and a config.json: that of the
    weights that the run began from, or one of ours."""
    shape, state = of_a_run(checkpoint, run, dtype)
    write_tensors(folder, tensors_for_transformers(shape, state), dtype)
    prepare.carry([run], Path(folder))
    tokens = prepare.tokenizer(checkpoint['tokenizer'], run)
    said_of_tokens = {}
    if not isinstance(tokens, prepare.HubTokenizer):
        said_of_tokens = {OUR_TOKENS: tokens.name}
        is_gpt2 = tokens.name == 'gpt2'
        why = "that of gpt2 lies on the hub, as 'gpt2'" if is_gpt2 else 'bytes have none'
        print(f'no tokenizer.json is written: {why}')
    if (run / 'config.json').is_file():
        said = read_json(run / 'config.json')
    else:
        said = config_json(shape)
        begin = [*tokens.begin, tokens.eot_token][0]
        said.update(bos_token_id=begin, eos_token_id=tokens.eot_token)
    name = str(dtype).removeprefix('torch.')
    # transformers 4 and 5
    said.update(tie_word_embeddings=shape.tied, torch_dtype=name, dtype=name)
    config.write_json(f'{folder}/config.json', {**said, **said_of_tokens})


@torch.no_grad()
def compare(checkpoint, folder, data):
    """Prints how far an exported model is from the one that was trained, on four rows of validation
    tokens, spread evenly over its data; computed in float32."""
    shape, tensors, _ = read_weights(folder)
    trained, exported = (make_model(some).float().eval()
                         for some in (checkpoint['model_config'], shape))
    put_layers(trained, checkpoint['settings'])
    trained.load_state_dict(checkpoint['model'])
    fill(exported, tensors, folder)
    x, y, _, documents = (*data.fixed_batch(0, 1, 4), None, None)[:4]
    with averaged_heads(trained):
        before = trained(x, documents=documents)
    after = exported(x, documents=documents)
    losses = [F.cross_entropy(logits.flatten(0, 1), y.flatten()) for logits in (before, after)]
    away = (after - before).abs()
    print(f'{x.numel()} validation tokens: loss {losses[0]:.4f} before the merge, {losses[1]:.4f} '
          f'after it; logits differ by {away.mean():.2g} on average, at most {away.max():.2g} '
          f'(their deviation is {before.std():.2g})')


def write_peft(run, checkpoint, folder, dtype):
    """
    Writes the heads of each layer of a checkpoint as one LoRA:

        (s / H) sum_h B_h A_h = alpha / (H r) [B_1 ...] [A_1; ...]

    LTE's heads train on after a merge: what merges have put into W and what came after them add up
    to this. Heads of q, k and v become one LoRA of the fused layer. A ViT's classifier is saved
    whole. On a tied output layer the LoRA is exact as long as PEFT does not merge it: that would
    change the embedding, too. ValueError: see `refuse_peft`.
    """
    s, state, text = checkpoint['settings'], checkpoint['model'], 'tokenizer' in checkpoint
    about = read_json(run / 'base.json') if (run / 'base.json').is_file() else {}
    base = about.get('init_from') if text else checkpoint.get('base', s['init_from'])
    layers = layers_with_heads(state, text)
    refuse_peft(s, layers, base, about.get('adapted'), text)
    if base == 'pretrained':
        base = checkpoint['model_config']['model']
    pairs = {}
    for name, ours in layers.items():
        n = next(state[f'{part}.A'].shape[2] for part in ours if f'{part}.A' in state)
        A, B = zip(*(heads_side_by_side(state, part, n) for part in ours))
        pairs[name] = torch.cat(A), torch.block_diag(*B)  # (R, n), (m, R): H r, of k thirds k H r
    R = max(len(A) for A, _ in pairs.values())
    tensors = {}
    for name, (A, B) in pairs.items():  # all layers get the rank R: zeros fill up smaller ones
        more = R - len(A)
        tensors[f'{name}.lora_A.weight'] = F.pad(A, (0, 0, 0, more))
        tensors[f'{name}.lora_B.weight'] = F.pad(B, (0, more))
    classifier = {}
    if not text:
        classifier = {name: x for name, x in merged_vit(checkpoint).items()
                      if name.startswith('head')}
    tensors = {f'base_model.model.{name}': x.to(dtype).contiguous()
               for name, x in {**tensors, **classifier}.items()}
    save_file(tensors, f'{folder}/adapter_model.safetensors', {'format': 'pt'})
    open_to_others(folder, 'adapter_model.safetensors')
    linears = [name.removesuffix('.weight') for name, x in state.items()
               if name.endswith('.weight') and x.dim() > 1]
    short = {name.split('.')[-1] for name in layers}
    means_more = any(name.split('.')[-1] in short and name not in layers for name in linears)
    config.write_json(f'{folder}/adapter_config.json', {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM' if text else None, 'inference_mode': True,
        'base_model_name_or_path': os.path.abspath(base) if os.path.exists(base) else base,
        'r': R, 'lora_alpha': s['alpha'] * R / (s['heads'] * s['rank']), 'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': text and 'n_mlp' not in checkpoint['model_config'],  # GPT-2's Conv1D
        'target_modules': list(layers) if means_more else sorted(short),
        'modules_to_save': sorted({name.split('.')[0] for name in classifier}) or None})
    prepare.carry([run], Path(folder))


def layers_with_heads(state, text):
    """Returns {name of a layer of the base: our names} of layers with heads. A fused qkv is three
    layers of ours (see hub.QKV). A ViT's classifier, or two, is left out: it is saved whole."""
    layers = {}
    for name in state:
        name, _, last = name.rpartition('.')
        if last != 'A':
            continue
        fused, _, third = name.rpartition('.')
        if third in ('q', 'k', 'v') and fused.endswith('.qkv'):
            layers[fused] = [f'{fused}.{third}' for third in 'qkv']
        elif text or not name.startswith('head'):
            layers[name] = [name]
    return layers


def refuse_peft(s, layers, base, adapted, text):
    """ValueError: the heads of a run, whose settings are s, are not all of what it trained, or
    belong to weights that nobody else has."""
    why = None
    if not layers:
        why = 'the run has no heads in its blocks'
    elif s['factors'] == 'basis' or s['merge_reset']:
        why = ('GaLore, GaLoLTE and ReLoRA train what they merge into the weights, and no heads '
               'hold it')
    elif s['train'] == 'all':
        why = "the run trains more than its heads (train='all')"
    elif adapted:
        why = f'the run began from {base!r}, an adapter itself, and PEFT loads one on a base'
    elif base in (None, 'scratch', 'resume') or os.path.isfile(base) and (text or is_ours(base)):
        why = f'the run began from {base!r}, and an adapter belongs to weights that others can load'
    if why:
        raise ValueError(f'{why}: export the merged model, without --adapter')


def is_ours(path):
    """Whether a file of a ViT's weights is a checkpoint with names or codes of ours. That of a run
    at full rank has timm's."""
    if not zipfile.is_zipfile(path):  # safetensors
        return False
    s = load_tensors(path).get('settings', {})
    return any(s.get(key) for key in ('lowrank', 'frozen_bits', 'param_bits'))


def heads_side_by_side(state, name, n):
    """A (H r, n), B (m, H r) of a layer; of one without heads (0, n), (m, 0)."""
    m = len(state[f'{name}.weight'])
    A = state.get(f'{name}.A', torch.empty(1, 0, n))
    B = state.get(f'{name}.B', torch.empty(1, m, 0))
    return side_by_side(A.mT).mT, side_by_side(B)


def write_timm(checkpoint, folder, dtype):
    """A ViT with its heads merged, for timm.create_model('local-dir:FOLDER', pretrained=True).

    timm 1.0.20 to 24 cannot read it."""
    import timm
    shape, classes = checkpoint['model_config'], checkpoint['classes']
    plain = create_vit(shape, len(classes)).to(dtype)
    plain.load_state_dict(merged_vit(checkpoint))
    plain.pretrained_cfg['crop_mode'] = 'center'  # as in training, see `look_of`
    changes = {theirs: shape[ours] for ours, theirs in SHAPE.items() if shape[ours] is not None}
    about = {'label_names': classes, 'num_classes': len(classes), 'model_args': changes}
    timm.models.save_for_hf(plain, folder, model_config=about, safe_serialization=True)
    open_to_others(folder, 'model.safetensors')


def main(settings):
    s = SimpleNamespace(**settings)
    with config.refusals():
        checkpoint = load_checkpoint(f'{s.out_dir}/{s.checkpoint}')
        dtype = checkpoint['settings']['param_dtype'] if s.dtype == 'auto' else s.dtype
        dtype = getattr(torch, dtype)
        run, text = Path(s.out_dir, 'tokenizer'), 'tokenizer' in checkpoint
        if not s.to:
            raise ValueError("to='' names no folder to write: set --to=FOLDER")
        if s.check and (s.adapter or not text):
            raise ValueError('check=True compares a merged model of text: leave out --adapter')
        if s.check:
            its = SimpleNamespace(**checkpoint['settings'])
            data = prepare.Tokens(its.dataset, 'val', its.block_size, its.data_dir, its.documents)
        if os.path.exists(s.to) and not s.overwrite:
            raise ValueError(f"'{s.to}' is already there: choose another --to, or replace it by "
                             '--overwrite=True')
        with config.written_beside(s.to, '.export_of_nanolowrank') as folder:
            if s.adapter:
                write_peft(run, checkpoint, folder, dtype)
                if checkpoint['settings'].get('frozen_bits'):
                    print('these heads belong to a base in 4 bits: on the base in 16 bits they '
                          "give other answers (transformers: load it by bitsandbytes, 'nf4')")
            elif text:
                write_transformers(run, checkpoint, folder, dtype)
            else:
                write_timm(checkpoint, folder, dtype)
        if s.check:
            compare(checkpoint, s.to, data)
    what = 'the heads' if s.adapter else 'the model'
    print(f"'{s.to}' holds {what} of {s.out_dir}/{s.checkpoint}, step {checkpoint['step']}")


if __name__ == '__main__':
    main(settings)
