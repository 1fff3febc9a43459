"""
Text, prompts and chats as rows of tokens, of which a model learns some:

    .txt, .md, ...                               all of it
    .jsonl  {"text": ...}                        all of it
            {"prompt": ..., "completion": ...}   the completion
            {"messages": [{"role": ..., "content": ...}, ...]}   what the assistant says

A row is (tokens, learned), two arrays of one length. Text is one stream, cut into rows of
block_size. A prompt or a chat has a row of its own, which a batch pads at its end, where no earlier
token sees it, so that attention needs no mask.
"""
import hashlib
import itertools
import json
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer


class HubTokenizer:
    """
    tokenizer.json of a folder, with its chat template.

    begin   the tokens that it puts before a text
    end     the end-of-text token
    """

    def __init__(self, folder):
        self.inner = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        # training may have left settings in the file that cut texts or pad them
        self.inner.no_truncation()
        self.inner.no_padding()
        path = Path(folder, 'tokenizer_config.json')
        options = json.loads(path.read_text('utf-8')) if path.exists() else {}
        # older files have a dict for a token, whose content is the string
        self.names = {key: token['content'] if isinstance(token, dict) else token
                      for key, token in options.items() if key.endswith('_token')}
        self.end = self.inner.token_to_id(self.names.get('eos_token') or '<|endoftext|>')
        assert self.end is not None, f'{folder}/tokenizer_config.json names no eos_token: add it'
        self.begin = [token for token in self.inner.encode('').ids if token != self.end]
        self.decode = self.inner.decode
        path = Path(folder, 'chat_template.jinja')
        self.source = path.read_text('utf-8') if path.exists() else options.get('chat_template')

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts):
        """Tokens of the parts' text, and whether each is learned. Parts are a prompt, an answer, a
        prompt, ... Their text is encoded as a whole, as it is when the model generates. A token in
        two parts belongs to the later one."""
        found = self.inner.encode(''.join(parts), add_special_tokens=False)
        part = np.searchsorted(np.cumsum([len(text) for text in parts]),
                               [end for _, end in found.offsets])
        return found.ids, part % 2 == 1

    # chats

    def render(self, messages, asks=False, tools=None):
        """The text of messages. asks: an answer follows."""
        # a template is somebody else's program, so it runs in a sandbox, with what transformers
        # offers it
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        assert self.source, 'the model has no chat template: take one that was trained on chats'

        def raise_exception(message):
            raise ValueError(f'the chat template refuses a chat: {message}')

        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
        sandbox.filters['tojson'] = partial(json.dumps, ensure_ascii=False)  # jinja's escapes HTML
        sandbox.globals.update(raise_exception=raise_exception,
                               strftime_now=lambda form: datetime.now().strftime(form))
        return sandbox.from_string(self.source).render(
            messages=messages, tools=tools, add_generation_prompt=asks, **self.names)

    def chat_parts(self, messages, tools=None):
        """The text of messages up to the last answer, as [prompt, answer, prompt, ...]. Where the
        template changes earlier turns later on (some drop thoughts), only the last pair."""
        for message in messages:  # a template would write None as 'None'
            assert isinstance(message['content'], str), f'{message} has no text as its content'
        texts = ['']  # up to a question, up to its answer, ...: each extends the one before
        for i, message in enumerate(messages):
            if message['role'] == 'assistant':
                texts.append(self.render(messages[:i], True, tools))
                texts.append(self.render(messages[:i + 1], False, tools))
        assert len(texts) > 1, f'the assistant does not answer in {messages}'
        if not all(after.startswith(before) for before, after in itertools.pairwise(texts)):
            texts = ['', *texts[-2:]]
        assert texts[-1].startswith(texts[-2]), \
            'the chat template writes a prompt differently with and without its answer'
        return [after[len(before):] for before, after in itertools.pairwise(texts)]

    def ends_of_answers(self):
        """The tokens after which generation ends: of a text, and of an answer in a chat."""
        if not self.source:
            return {self.end}
        chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'the answer'}]
        after = self.encode(self.render(chat).rpartition('the answer')[2])
        added = self.inner.get_added_tokens_decoder()
        special = [token for token in after if token in added and added[token].special]
        return {self.end, *special[:1]}


def documents(path, tokenizer):
    """Yields (what decides about validation, tokens, learned) of a file. Text has learned=None."""
    if Path(path).suffix != '.jsonl':  # in pieces of whole lines, so that some are for validation
        lines = Path(path).read_text('utf-8').splitlines(keepends=True)
        size = max(len(lines) // 200, 1)
        for i in range(0, len(lines), size):
            piece = ''.join(lines[i:i + size])
            first = tokenizer.begin if i == 0 else []
            last = [tokenizer.end] if i + size >= len(lines) else []
            yield piece, [*first, *tokenizer.encode(piece), *last], None
        return
    begin, end = tokenizer.begin, tokenizer.end
    for line in filter(str.strip, Path(path).read_text('utf-8').split('\n')):
        record = json.loads(line)
        if 'messages' in record:
            parts = tokenizer.chat_parts(record['messages'], record.get('tools'))
            yield parts[0], *tokenizer.encode_parts(parts)
        elif 'completion' in record:
            tokens, learned = tokenizer.encode_parts([record['prompt'], record['completion']])
            yield (record['prompt'], [*begin, *tokens, end],
                   np.concatenate([np.zeros(len(begin), bool), learned, [True]]))
        else:
            text = record['text']
            yield text, [*begin, *tokenizer.encode(text), end], None


def read_rows(paths, tokenizer, block_size, share=0.05):
    """The rows (train, validation) of files. A hash decides, so that equal prompts are on one side.
    A row longer than block_size loses its end, and is left out if it then has no target."""
    found = [document for path in paths for document in documents(path, tokenizer)]
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key, _, _ in found]
    border = sorted(hashes)[int(share * len(hashes))]
    splits = []
    for is_train in (True, False):
        stream, rows = [], []
        for key, (_, tokens, learned) in zip(hashes, found):
            if (key > border) != is_train:
                continue
            if learned is None:
                stream += tokens
            else:
                rows.append((np.array(tokens), learned))
        for i in range(0, len(stream) - 1, block_size):  # a row begins with the last target before
            tokens = np.array(stream[i:i + block_size + 1])
            rows.append((tokens, np.ones(len(tokens), bool)))
        rows = [(tokens[:block_size + 1], learned[:block_size + 1]) for tokens, learned in rows]
        splits.append([row for row in rows if row[1][1:].any()])
    return splits


def make_batch(rows, device):
    """Inputs and targets (rows, time) of rows. Targets that are not learned are -100."""
    time = max(len(tokens) for tokens, _ in rows) - 1
    x = torch.zeros(len(rows), time, dtype=torch.long)
    y = torch.full((len(rows), time), -100)
    for i, (tokens, learned) in enumerate(rows):
        tokens = torch.from_numpy(tokens)
        x[i, :len(tokens) - 1] = tokens[:-1]
        y[i, :len(tokens) - 1] = torch.where(torch.from_numpy(learned[1:]), tokens[1:], -100)
    return x.to(device), y.to(device)
