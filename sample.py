"""
Text from a checkpoint of train_gpt.py or train_llama.py, or from a folder or a name of the hub as
init_from:

$ python sample.py --out_dir=out/quickstart --prompt='def ' --num_samples=2
$ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --prompt='The sea'
"""

import itertools
import os
import sys
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
init_from = ''  # instead of a run's checkpoint: what init_from of a training script may name
prompt = '\n'
num_samples = 3
max_new_tokens = 200
temperature = 0.8  # 0: always the most likely token
top_k = 200  # sample among so many, 0: among all
seed = 1337
device = 'auto'
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    settings = config.load(globals(), defaults, sys.argv[1:])

import torch

import prepare
from hub import fill, folders_of, read_weights
from model import generate, make_model
from run import join


def read(source):
    """(model, tokenizer) of a run's checkpoint, or of what init_from names."""
    shape, tensors, tokens = read_weights(source)
    tensors = iter(tensors)
    first = next(tensors, ('nothing', torch.zeros(())))
    with torch.device('meta'):
        model = make_model(shape)
    model.to(first[1].dtype).to_empty(device='cpu')  # as the file has it, and not drawn in vain
    fill(model, itertools.chain([first], tensors), source)
    if tokens is None:
        raise ValueError(f"'{source}' does not say what its tokens are: give a folder with a "
                         'tokenizer.json')
    folders = folders_of(source)[::-1]
    known = (folder for folder in folders if os.path.isfile(f'{folder}/tokenizer.json'))
    return model, prepare.tokenizer(tokens, next(known, folders[0]))


def main(settings):
    s = SimpleNamespace(**settings)
    process = join({'device': s.device, 'dtype': 'auto', 'param_dtype': 'float32'})
    with config.refusals():
        model, tokens = read(s.init_from or f'{s.out_dir}/{s.checkpoint}')
        end = tokens.eot_token
        start = tokens.encode_ordinary(s.prompt) or [end]
    model.to(process.device).eval()

    generator = torch.Generator(process.device).manual_seed(s.seed)
    start = torch.tensor([start] * s.num_samples, device=process.device)  # (num_samples, time)
    texts = generate(model, start, s.max_new_tokens, temperature=s.temperature, top_k=s.top_k,
                     generator=generator, vocab_size=tokens.n_vocab).tolist()
    for row, text in enumerate(texts):
        ends = [i for i, token in enumerate(text)
                if token == end and i >= start.shape[1]]
        if ends:  # what follows is another text
            texts[row] = text = text[:ends[0]]
        print(tokens.decode(text))
        print('-' * 40)
    return texts


if __name__ == '__main__':
    main(settings)
