"""Tests of extras/finetune.py, hub.py and chats.py: python -m pytest -q extras/test_finetune.py"""
import json
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from extras.chats import HubTokenizer, make_batch, read_rows
from extras.hub import generate, read_model, write_model
from galore import LowRankOptimizer
from test_lowrank import close, run, same, saved

transformers = pytest.importorskip('transformers')
parametrize = pytest.mark.parametrize
METHODS = ['full', 'int8', 'lora', 'qlora', 'galore']

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ROPE = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {'llama': dict(rope_parameters=ROPE), 'mistral': dict(sliding_window=64),
            'qwen2': dict(tie_word_embeddings=True), 'qwen3': dict(head_dim=24),
            'smollm2': dict(model_type='llama', tie_word_embeddings=True)}


def make_folder(folder, family='qwen2'):
    """A tiny random model with a tokenizer of bytes and a chat template, as transformers saves."""
    torch.manual_seed(0)
    changes = {'model_type': family, **FAMILIES[family]}
    config = transformers.AutoConfig.for_model(
        changes.pop('model_type'), vocab_size=259, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=256, eos_token_id=258, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for p in model.parameters():  # so that norms and biases matter
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(['<s>', '<|im_start|>', '<|im_end|>'])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token='<s>', eos_token='<|im_end|>', chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits_of(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
CHAT = [{'role': 'user', 'content': 'Hi, é?'}, {'role': 'assistant', 'content': 'Yes.'},
        {'role': 'user', 'content': 'Why'}, {'role': 'assistant', 'content': 'So'}]


@parametrize('family', FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, family):
    """Of a model that is read, and of one that is written again."""
    folder = make_folder(tmp_path / 'in', family)
    expected, net = logits_of(folder, TOKENS), read_model(folder)
    close(net(TOKENS).detach(), expected, 1e-5)
    write_model(net, folder, tmp_path / 'out')
    close(logits_of(tmp_path / 'out', TOKENS), expected, 1e-6)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    greedy = model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert generate(net, TOKENS[0].tolist(), 8, temperature=0) == greedy[0, 40:].tolist()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('model'))


def write_records(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return str(path)


def test_only_answers_are_targets(folder, tmp_path):
    records = [{'messages': CHAT}, {'prompt': 'two and two', 'completion': ' is 4'}]
    tokenizer = HubTokenizer(folder)
    train, val = read_rows([write_records(tmp_path / 'a.jsonl', records)], tokenizer, 200)
    rows = sorted(train + val, key=lambda row: -len(row[0]))
    x, y = make_batch(rows, 'cpu')
    def read(tokens):
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert [read(row[row >= 0]) for row in y] == ['Yes.<|im_end|>\nSo<|im_end|>\n',
                                                  ' is 4<|im_end|>']
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    whole = theirs.apply_chat_template(CHAT, tokenize=False)
    assert read(rows[0][0]) == whole and tokenizer.render(CHAT[:3], True) == \
        theirs.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert rows[0][0].tolist() == theirs(whole, add_special_tokens=False).input_ids
    # the padding of the shorter row changes nothing
    net = read_model(folder).double()
    count = (y >= 0).sum(1)
    alone = sum(net(*make_batch([row], 'cpu')) * n for row, n in zip(rows, count)) / count.sum()
    close(net(x, y), alone, 1e-12)


def test_text_is_cut_into_rows(folder, tmp_path):
    text = ''.join(f'line {i}\n' for i in range(1000))
    (tmp_path / 'a.txt').write_text(text)
    train, val = read_rows([tmp_path / 'a.txt'], HubTokenizer(folder), 50)
    assert sum(len(tokens) - 1 for tokens, _ in train + val) == len(text) + 1 - 2  # end; two starts
    assert 0.02 < len(val) / len(train) < 0.1
    assert all(a[0][-1] == b[0][0] for a, b in zip(train, train[1:]))


ARGUMENTS = ['--max_iters=8', '--warmup_iters=2', '--batch_size=4', '--block_size=64', '--rank=8',
             '--alpha=16', '--update_proj_gap=4', '--eval_iters=2', '--eval_interval=8',
             '--log_interval=1', '--learning_rate=0.01', '--device=cpu', '--dtype=float32']


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
    """Prompts of all lengths, whose answer is easy."""
    records = [{'prompt': f'{i}, {"la " * (i % 9)}:', 'completion': ' four' * (1 + i % 3)}
               for i in range(60)]
    return write_records(tmp_path_factory.mktemp('data') / 'chats.jsonl', records)


def finetune(folder, chats, out, method, *more):
    if method in ('int8', 'qlora'):
        pytest.importorskip('extras.bits')
    return run('extras/finetune', f'--model={folder}', f'--data={chats}', f'--out_dir={out}',
               f'--method={method}', *ARGUMENTS, *more)


@parametrize('method', METHODS)
def test_finetuned_folder_loads_into_transformers(folder, chats, tmp_path, capsys, method):
    # an output layer with heads is no longer the embedding
    adapter = [f'--to_adapter={tmp_path}/peft', '--target_modules=attn,mlp,logit']
    adapter = adapter if method == 'lora' else []
    found = finetune(folder, chats, tmp_path / 'run', method, f'--to={tmp_path}/hf', *adapter,
                     '--prompt=1, :', '--temperature=0', '--max_new_tokens=5')
    log = [json.loads(line) for line in Path(tmp_path, 'run/log.jsonl').read_text().splitlines()]
    losses = [record['val_loss'] for record in log if 'val_loss' in record]
    assert losses[-1] < 0.8 * losses[0]
    assert '1, :' in capsys.readouterr().out.splitlines()[-1]
    x, y = make_batch(found['val'], 'cpu')
    logits = logits_of(tmp_path / 'hf', x)
    assert F.cross_entropy(logits.flatten(0, 1), y.flatten()).item() == \
        pytest.approx(losses[-1], abs=1e-4)
    if adapter:
        peft = pytest.importorskip('peft')
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        net = peft.PeftModel.from_pretrained(base, f'{tmp_path}/peft').eval()
        close(net(x).logits.detach(), logits, 1e-4)
        close(read_model(f'{tmp_path}/peft')(x).detach(), logits, 1e-4)


@parametrize('method', METHODS)
def test_interrupted_run_resumes_bit_for_bit(folder, chats, tmp_path, method):
    step = LowRankOptimizer.step

    def step_and_interrupt(optimizer):
        step(optimizer)
        if optimizer.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
    finetune(folder, chats, tmp_path / 'whole', method)
    with patch.object(LowRankOptimizer, 'step', step_and_interrupt), pytest.raises(SystemExit):
        finetune(folder, chats, tmp_path / 'two', method)
    assert saved(tmp_path / 'two')['step'] == 3
    finetune(folder, chats, tmp_path / 'two', method, '--resume=True')
    assert same(saved(tmp_path / 'whole'), saved(tmp_path / 'two'))


def test_accumulated_steps_and_epochs(folder, chats, tmp_path):
    """Micro-batches weigh as much as they have targets, and an epoch has each row once."""
    more = ['--grad_clip=0', '--gradient_checkpointing=True']
    one = finetune(folder, chats, tmp_path / '1', 'full', '--batch_size=8', *more)
    finetune(folder, chats, tmp_path / '2', 'full', '--batch_size=2',
             '--gradient_accumulation_steps=4', '--eval_iters=8', *more)
    x, y = (saved(tmp_path / name)['model'] for name in '12')
    for name in x:
        close(x[name], y[name], 1e-4)
    rows = [id(row) for step in range(len(one['train'])) for row in one['get_rows'](step)]
    assert all(rows.count(id(row)) == 8 for row in one['train'])
    first = rows[:len(one['train'])]
    assert len({*first}) == len(first) and first != rows[len(first):2 * len(first)]
