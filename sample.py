"""
Text from a checkpoint of train_gpt.py or train_llama.py:

$ python sample.py --out_dir=out/quickstart --prompt='def ' --num_samples=2
"""

import sys

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
prompt = '\n'
num_samples = 3
max_new_tokens = 200
temperature = 0.8  # 0: always the most likely token
top_k = 200  # sample among so many, 0: among all
seed = 1337
merged = True  # False: compute with the heads applied instead of merged into the weights (the same text)
device = 'auto'
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    config.load(globals(), defaults, sys.argv[1:])

import torch  # noqa: E402

import prepare  # noqa: E402
from galore import put_layers  # noqa: E402
from lowrank import averaged_heads, merge  # noqa: E402
from model import GPT, GPTConfig, Llama, LlamaConfig, generate  # noqa: E402


def main(argv):
    settings = config.load(globals(), defaults, argv)
    _, _, dev, _ = config.join(device, 'auto', 'float32')
    with config.refusals():
        config.check_numbers(settings)
        state = config.load_checkpoint(f'{out_dir}/{checkpoint}')
        if 'tokenizer' not in state:
            raise ValueError(f"'{out_dir}' holds a ViT, which writes no text: set --out_dir to a GPT's or a LLaMA's")
        tokens = prepare.tokenizer(state['tokenizer'])
    s = state['settings']
    shape = state['model_config']
    model = Llama(LlamaConfig(**shape)) if 'n_mlp' in shape else GPT(GPTConfig(**shape))
    model.to(getattr(torch, s['param_dtype']))
    put_layers(model, s)
    model.load_state_dict(state['model'])
    model.to(dev).eval()
    if merged:
        merge(model)

    generator = torch.Generator(dev).manual_seed(seed)
    start = tokens.encode_ordinary(prompt) or [tokens.eot_token]
    start = torch.tensor([start] * num_samples, device=dev)  # (num_samples, time)
    with averaged_heads(model):
        texts = generate(model, start, max_new_tokens, temperature, top_k, generator, tokens.n_vocab).tolist()
    for text in texts:
        print(tokens.decode(text))
        print('-' * 40)
    return texts


if __name__ == '__main__':
    main(sys.argv[1:])
