"""
Writes tiny random models by transformers, and their logits, for the tests: python assets/golden/make.py

What lies here was written by transformers 5.24.0 and torch 2.13.0, in float32, with eager attention.
"""

import os

import torch
import transformers
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPE = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=48)
LLAMA3 = dict(rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    'llama2': transformers.LlamaConfig(**SHAPE | {'num_key_value_heads': 4}),
    'llama3': transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-3, rope_parameters=LLAMA3),
    'smollm2': transformers.LlamaConfig(**SHAPE, rope_parameters=dict(rope_type='default', rope_theta=1e5),
                                        tie_word_embeddings=True),
    'mistral': transformers.MistralConfig(**SHAPE, sliding_window=40),
    'qwen2': transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    'qwen3': transformers.Qwen3Config(**SHAPE, head_dim=6),
    'gpt2': transformers.GPT2Config(vocab_size=32, n_positions=48, n_embd=16, n_layer=2, n_head=4,
                                    layer_norm_epsilon=1e-3)}

for name, shape in MODELS.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation='eager').float().eval()
    for parameter in model.parameters():  # so that norms, biases and attention matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(32, (2, 40))
    model.save_pretrained(f'{HERE}/{name}', max_shard_size='12KB' if name == 'llama3' else '5GB')
    with torch.no_grad():
        logits = model(tokens).logits.contiguous()
    save_file({'tokens': tokens, 'logits': logits}, f'{HERE}/{name}/logits.safetensors')
