"""
Samples text from a checkpoint of train_gpt.py or train_llama.py, or from a model that init_from
names, a folder or a name of the hub:

$ python sample.py --out_dir=out/quickstart --prompt='def ' --num_samples=2
$ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --prompt='The sea'
$ python sample.py --out_dir=out/mine --chat
"""

import contextlib
import itertools
import os
import sys
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
init_from = ''  # instead of a run's checkpoint: what init_from of a training script may name
chat = False  # True: talk to it, by its chat template; Ctrl-C ends an answer, Ctrl-D the chat
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
from model import crop, following, length_of, make_model, new_cache
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
    folders = folders_of(source)  # an adapter's own comes first: it may have another chat template
    same = (folder for folder in folders if os.path.isfile(f'{folder}/tokenizer.json')
            and prepare.HubTokenizer(folder).name == tokens)
    return model, prepare.tokenizer(tokens, next(same, folders[-1]))


def tokens_that_end(tokens):
    """The tokens after which an answer is over: end-of-text, and what a folder's
    generation_config.json names."""
    path = os.path.join(tokens.folder, 'generation_config.json')
    named = config.read_json(path).get('eos_token_id') if os.path.isfile(path) else None
    if not isinstance(named, list):
        named = [named]
    return {tokens.eot_token, *named}


def end_of_turn(template, tokens):
    """The special token that a chat template puts after an answer, which is what a chat learns to
    end with; None: there is none. A base model's end-of-text may be another."""
    messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'the answer'}]
    after = template.render(messages).rpartition('the answer')[2]
    special = {token for token, about in tokens.inner.get_added_tokens_decoder().items()
               if about.special}
    following = tokens.encode_many([after])[0].tolist()
    return next((token for token in following if token in special), None)


def talk(model, tokens, s, generator):
    """Answers each line of the terminal until its input ends, and returns the messages. Keys and
    values of the chat so far are kept, not computed again."""
    template = prepare.Template(tokens.folder)
    ends = tokens_that_end(tokens) | {end_of_turn(template, tokens)}
    device = next(model.parameters()).device
    messages, seen, cache = [], [], new_cache(model)
    while True:
        try:
            said = input('> ')
        except EOFError:
            print()
            return messages
        if not said.strip():
            continue
        messages.append({'role': 'user', 'content': said})
        idx = tokens.encode_many([template.render(messages, True)])[0].tolist()
        if len(idx) + s.max_new_tokens > model.config.block_size and len(messages) > 1:
            print(f'(a chat of more than {model.config.block_size} tokens: it begins anew)')
            messages = messages[-1:]
            idx = tokens.encode_many([template.render(messages, True)])[0].tolist()
        same = [a == b for a, b in zip(seen[:length_of(cache)], idx[:-1])]
        crop(cache, (*same, False).index(False))
        answer, text = [], ''
        more = following(model, torch.tensor([idx], device=device), s.temperature, s.top_k,
                         generator, tokens.n_vocab, cache)
        with contextlib.suppress(KeyboardInterrupt):
            for token in itertools.islice(more, s.max_new_tokens):
                if token.item() in ends:
                    break
                answer.append(token.item())
                whole = tokens.decode(answer)
                if not whole.endswith('\ufffd'):  # half a character
                    print(whole[len(text):], end='', flush=True)
                    text = whole
        print()
        crop(cache, min(length_of([kept]) for kept in cache))  # Ctrl-C can stop between two blocks
        seen = idx + answer
        messages.append({'role': 'assistant', 'content': text})


def main(settings):
    s = SimpleNamespace(**settings)
    process = join({'device': s.device, 'dtype': 'auto', 'param_dtype': 'float32'})
    with config.refusals():
        model, tokens = read(s.init_from or f'{s.out_dir}/{s.checkpoint}')
        end = tokens.eot_token
        start = tokens.encode_ordinary(s.prompt) or [end]
    model.to(process.device).eval()

    generator = torch.Generator(process.device).manual_seed(s.seed)
    if s.chat:
        with config.refusals():
            return talk(model, tokens, s, generator)
    start = torch.tensor([start] * s.num_samples, device=process.device)  # (num_samples, time)
    more = following(model, start, s.temperature, s.top_k, generator, tokens.n_vocab)
    texts = torch.cat([start, *itertools.islice(more, s.max_new_tokens)], 1).tolist()
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
