"""What `generate()` can ask, against an uncached forward or plain greedy decoding.

With `retrieval_prefill="sparse"` every row attends as a decode step does, so caching must not change a single token.
The window is 8 tokens and the generations run far past it: the ring wraps many times.
"""

import pytest
import torch
from families import allocated_bytes, everything_retrieves, padded_batch, tiny_base
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from rtpurbo_hf.modeling.cache_rtpurbo import SLACK
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

NEW = 40
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def make(family="llama", *, prefill="sparse", heads=None, vocab_size=97, **options):
    torch.manual_seed(0)
    base = tiny_base(family, num_attention_heads=6, num_key_value_heads=3, hidden_size=48, vocab_size=vocab_size)
    if heads is None:
        # KV head 0 serves one retrieval and one local head, KV head 1 none, KV head 2 two retrieval heads
        heads = [[0, 4, 5] if layer else [] for layer in everything_retrieves(base)]
    options = {"index_dim": 8, "index_rotary_dim": 4, "index_top_p": 0.7, "index_min_tokens": 3, **options}
    model = RTPurboForCausalLM.from_base(
        base,
        retrieval_heads=heads,
        sliding_window=8,
        num_sink_tokens=2,
        retrieval_prefill=prefill,
        index_rotary_wavelengths=[8.0, 256.0],
        **options,
    )
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj, std=0.5)
        torch.nn.init.normal_(indexer.k_proj, std=0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def uncached_greedy(model, ids, mask, new=NEW):
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.fixture(scope="module")
def batch():
    return padded_batch((5, 30, 41))


@pytest.fixture(scope="module")
def expected(model, batch):
    return uncached_greedy(model, *batch)


@pytest.fixture(scope="module")
def single(model, expected):
    """The last, unpadded row alone."""
    return expected[2:, :41], expected[2:]


def test_greedy_equals_uncached_forward(model, batch, expected):
    ids, mask = batch
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "cohere2", "qwen3_next", "lfm2", "qwen3"])
def test_greedy_equals_uncached_forward_in_other_families(family):
    model = make(family)
    ids, mask = padded_batch((9, 12))
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False),
        uncached_greedy(model, ids, mask, 12),
    )


@pytest.mark.parametrize("sharing", ["head", "kv_head"])
@pytest.mark.parametrize("block", [1, 16])
def test_greedy_equals_uncached_forward_for_index_forms(sharing, block, batch):
    model = make(index_key_sharing=sharing, index_block_size=block, index_rotary_dim=0)
    ids, mask = batch
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached_greedy(model, ids, mask))


@pytest.mark.parametrize("mode", ["dense", "streaming", "headwise"])
def test_other_modes_equal_uncached_forward(model, batch, mode):
    ids, mask = batch
    with model.attention_mode(mode):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached_greedy(model, ids, mask))


def test_static_cache(model, batch, expected):
    """Allocated once, and never moved; the same tokens."""
    ids, mask = batch
    output = model.generate(
        ids, attention_mask=mask, cache_implementation="static", return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(output.sequences, expected)
    cache = output.past_key_values
    assert cache.layers[0].keys.shape[2] == cache.max_length < ids.shape[1] + NEW + 1


HYBRIDS = ["gemma3_text", "gpt_oss", "cohere2", "qwen3_next", "lfm2"]


@pytest.mark.parametrize("family", HYBRIDS)
def test_static_cache_of_hybrid_bases(family):
    """Token for token as the dynamic cache; native windows of 6 tokens wrap, and one row is padding mostly."""
    model = make(family)
    ids, mask = padded_batch((5, 30))
    options = {"attention_mask": mask, "max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False}
    dynamic = model.generate(ids, **options)
    output = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, dynamic)
    assert output.past_key_values.max_length is not None
    for index in output.past_key_values.native_windows:
        layer = output.past_key_values.layers[index]
        assert layer.window_keys.shape[2] == min(layer.max_length, 6 + SLACK)
        assert layer.keys.numel() == 0


@pytest.mark.parametrize("family", HYBRIDS)
def test_static_cache_of_hybrid_bases_with_chunks_and_beams(family):
    model = make(family)
    ids, mask = padded_batch((5, 30))
    for options in ({"prefill_chunk_size": 7}, {"num_beams": 3}):
        options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **options}
        dynamic = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)


def addresses(cache):
    """Where everything that a captured graph would read lies."""
    found = {"start": cache.start.data_ptr(), "length": cache.device_length.data_ptr()}
    for index, layer in enumerate(cache.layers):
        states = dict(vars(layer))
        for name in ("conv_states", "recurrent_states"):
            states |= {f"{name}{i}": state for i, state in states.pop(name, {}).items()}
        found |= {(index, k): v.data_ptr() for k, v in states.items() if isinstance(v, torch.Tensor) and v.numel()}
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_static_cache_never_moves(family):
    """Regression: a second prompt on the same cache, or a change of beams, gave stores new addresses, and captured
    graphs would have read the old ones."""
    model = make(family)
    ids, mask = padded_batch((5, 60))
    cache = model.new_cache(max_length=120)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(first, last):
        with torch.no_grad():
            return model(
                ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                past_key_values=cache,
            ).logits  # fmt: skip

    run(0, 30), run(30, 31)
    before = addresses(cache)
    assert len(before) > 2 + 4 * 2
    run(31, 59)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    last = run(59, 60)
    assert addresses(cache) == before
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1:]
    assert (last - whole).abs().max() < 1e-4


def test_other_padding_drops_graphs(model):
    ids, mask = padded_batch((5, 30))
    cache = model.new_cache(max_length=80)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.graphs[2] = None
        cache.crop(-30)
        model(ids, attention_mask=mask, past_key_values=cache)
    assert not cache.graphs


@torch.no_grad()
def test_long_turn_after_a_padded_batch(model):
    """Regression: without a mask, or with one of ones, rows were taken to begin at slot 0 and the ring was misread."""
    ids, mask = padded_batch((35, 70))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def second_turn(mask):
        cache = model.new_cache()
        model(ids[:, :40], attention_mask=first, position_ids=positions[:, :40], past_key_values=cache)
        return model(ids[:, 40:], attention_mask=mask, position_ids=positions[:, 40:], past_key_values=cache).logits

    first = mask[:, :40]
    assert torch.equal(second_turn(None), second_turn(mask))
    with pytest.raises(ValueError, match=r"rows begin at \[0, 0\], the cached rows begin at \[35, 0\]"):
        second_turn(torch.ones_like(mask))


def test_static_cache_with_beams(model, batch):
    ids, mask = batch
    options = {"num_beams": 3, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    outputs = [
        model.generate(ids, attention_mask=mask, cache_implementation=kind, **options) for kind in (None, "static")
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_dense_below(batch, static):
    """Short contexts are the base model's; past the limit the stores are split and everything is sparse."""
    ids, mask = batch
    model = make(dense_below=70)
    with model.attention_mode("dense"):
        dense = model.generate(ids, attention_mask=mask, max_new_tokens=28, min_new_tokens=28, do_sample=False)
    kind = "static" if static else None
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "cache_implementation": kind,
        "return_dict_in_generate": True,
    }
    short = model.generate(ids, max_new_tokens=28, min_new_tokens=28, **options)
    assert torch.equal(short.sequences, dense)
    assert short.past_key_values.nbytes()["window"] == 0
    long = model.generate(ids, max_new_tokens=40, min_new_tokens=40, **options)
    assert torch.equal(long.sequences[:, : dense.shape[1]], dense)
    assert long.past_key_values.nbytes()["window"] > 0
    # the same by hand: a window and a p that drop nothing until the limit, and the real ones from there on
    hand = make()
    hand.config.sliding_window, hand.config.index_top_p = 1000, 1.0
    cache, tokens = hand.new_cache(), long.sequences
    mask = torch.cat([mask, torch.ones(3, 40, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        hand(tokens[:, :41], attention_mask=mask[:, :41], position_ids=positions[:, :41], past_key_values=cache)
        for i in range(41, 80):
            if i + 1 >= 70:
                hand.config.sliding_window, hand.config.index_top_p = 8, 0.7
            logits = hand(
                tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            ).logits[:, -1]  # fmt: skip
            logits[:, 2] = -torch.inf
            assert torch.equal(logits.argmax(-1), tokens[:, i + 1]), i


@torch.no_grad()
def test_crop_around_the_end_of_dense_below():
    """Regression: a step that went over the limit and was cropped below it read split stores as whole ones."""
    ids, model = padded_batch((90,))[0], make(dense_below=60)

    def steps(cache, first, last):
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, last)], 1)

    one_by_one, drafted = model.new_cache(), model.new_cache()
    model(ids[:, :50], past_key_values=one_by_one), model(ids[:, :50], past_key_values=drafted)
    model(ids[:, 50:65], past_key_values=drafted)
    drafted.crop(-10)
    steps(one_by_one, 50, 55)
    assert (steps(drafted, 55, 75) - steps(one_by_one, 55, 75)).abs().max() < 1e-5
    # split up for good: below the limit again, and still sparse
    one_by_one.crop(-20)
    drafted.crop(-20)
    again = steps(drafted, 55, 75)
    model.config.dense_below = 0
    assert (again - steps(one_by_one, 55, 75)).abs().max() < 1e-5


def test_prompt_as_embeddings(model, batch, expected):
    ids, mask = batch
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected[:, 41:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected)


def test_use_cache_false(model, batch, expected):
    ids, mask = batch
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_chunked_prefill(model, batch, expected, chunk):
    ids, mask = batch
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY), expected)


@pytest.mark.parametrize("chunk", [7, 13, 40])
def test_chunked_prefill_with_dense_retrieval_heads(batch, chunk):
    """Prompt pieces as short as a decode step are prefill all the same."""
    model = make(prefill="dense")
    ids, mask = batch
    whole = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY), whole)


@pytest.mark.parametrize("sampling", [False, True], ids=["beam-search", "beam-sample"])
def test_beams(model, batch, sampling):
    ids, mask = batch
    options = {"num_beams": 3, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": sampling}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*outputs)


def test_sampling_and_return_sequences(model, batch):
    ids, mask = batch
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 24, "min_new_tokens": 24}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        outputs.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert outputs[0].shape[0] == 6
    assert torch.equal(*outputs)


def test_assisted_as_target(model, single):
    ids, expected = single
    assistant = tiny_base(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, seed=5)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_assisted_as_target_and_assistant(model, single):
    ids, expected = single
    assert torch.equal(model.generate(ids, assistant_model=make(), **GREEDY), expected)


def test_assisted_as_assistant(model, single):
    ids, _ = single
    target = tiny_base(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, seed=5)
    assert torch.equal(target.generate(ids, assistant_model=model, **GREEDY), target.generate(ids, **GREEDY))


def test_assisted_with_dense_prefill_equals_plain():
    """The first drafts come with the prompt in one forward; they must decode all the same."""
    model, ids = make(prefill="dense"), padded_batch((41,))[0]
    assert torch.equal(model.generate(ids, assistant_model=make(), **GREEDY), model.generate(ids, **GREEDY))


def test_prompt_lookup(model, single):
    ids, expected = single
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY), expected)


@pytest.mark.parametrize("turn", [None, 3, 25], ids=["prompt", "short turn", "long turn"])
def test_more_drafts_than_decode_max_queries(turn):
    """Regression: 17 drafts and more attended as a prompt does, and a second turn was appended to itself."""
    model, phrase = make(prefill="dense"), padded_batch((25,), seed=0)[0]
    ids = phrase.repeat(1, 3)

    def generate(**options):
        prompt, cache = ids, None
        if turn is not None:
            first = model.generate(ids, return_dict_in_generate=True, max_new_tokens=10, min_new_tokens=10)
            prompt, cache = torch.cat([first.sequences, phrase[:, :turn]], 1), first.past_key_values
        new = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, past_key_values=cache, **new, **options)

    plain = generate()
    assert torch.equal(generate(prompt_lookup_num_tokens=20), plain)
    assert torch.equal(generate(prompt_lookup_num_tokens=2), plain)


def test_continue_from_returned_cache(model, single):
    ids, expected = single
    half = {"max_new_tokens": NEW // 2, "min_new_tokens": NEW // 2, "do_sample": False}
    first = model.generate(ids, return_dict_in_generate=True, **half)
    mask = torch.ones_like(first.sequences)  # a generated id may be the padding id: say that none is padding
    second = model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **half)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("turn", [5, 30])
def test_second_turn_of_a_chat(model, single, turn):
    ids, _ = single
    first = model.generate(ids, return_dict_in_generate=True, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    user = torch.randint(3, 97, (1, turn), generator=torch.Generator().manual_seed(7))
    prompt = torch.cat([first.sequences, user], 1)
    mask = torch.ones_like(prompt)
    got = model.generate(
        prompt, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=12, min_new_tokens=12
    )
    assert torch.equal(got, uncached_greedy(model, prompt, torch.ones_like(prompt), 12))


@pytest.mark.parametrize("amount", [0, -1, -5, torch.tensor(-3), 60], ids=["0", "-1", "-5", "tensor", "keep-60"])
def test_crop(model, single, amount):
    """Cropped caches continue as if the cropped tokens had never been."""
    _, expected = single
    ids = expected[:, :64]
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        for i in range(50, 64):
            model(ids[:, i : i + 1], past_key_values=cache)
        cache.crop(amount)
        kept = 60 if amount == 60 else 64 + int(amount)
        assert cache.get_seq_length() == kept
        got = model(ids[:, kept - 1 : kept] * 0 + 5, past_key_values=cache).logits
        whole = torch.cat([ids[:, :kept], torch.full((1, 1), 5)], 1)
        assert (got[:, -1] - model(whole, use_cache=False).logits[:, -1]).abs().max() < 1e-4


def test_crop_too_far_says_so(model, single):
    _, expected = single
    long = expected.repeat(1, 4)
    cache = model.new_cache()
    with torch.no_grad():
        model(long, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot crop 300 tokens"):
        cache.crop(-300)


def test_batch_select_and_repeat(model, batch):
    ids, mask = batch
    with torch.no_grad():
        cache = model.new_cache()
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        token = torch.full((4, 1), 9)
        more = torch.cat([mask[rows], torch.ones(4, 1, dtype=torch.long)], 1)
        positions = more.sum(1, keepdim=True) - 1
        got = model(token, attention_mask=more, position_ids=positions, past_key_values=cache).logits[:, -1]
        whole = model(
            torch.cat([ids[rows], token], 1),
            attention_mask=more,
            position_ids=(more.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[:, -1]
    assert (got - whole).abs().max() < 1e-4


def test_gradient_checkpointing_changes_nothing():
    model = make(prefill="dense")
    ids, mask = padded_batch((20, 24))
    model.train()
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        decode = torch.zeros_like(mask, dtype=torch.bool)
        decode[:, -6:] = True
        loss = model(ids, attention_mask=mask, labels=ids, decode_rows=decode).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert len(results[0][1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_decode_rows_equal_decode_steps():
    """An uncached forward with `decode_rows` is a prefill followed by decode steps."""
    model = make(prefill="dense")
    ids, mask = padded_batch((29, 40))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        rows = model(ids, attention_mask=mask, position_ids=positions, decode_rows=8, use_cache=False).logits
        cache = model.new_cache()
        model(ids[:, :32], attention_mask=mask[:, :32], position_ids=positions[:, :32], past_key_values=cache)
        for i in range(32, 40):
            step = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            )  # fmt: skip
            assert (step.logits[:, 0] - rows[:, i]).abs().max() < 1e-4


def test_memory_is_what_nbytes_says():
    """Allocated bytes, counted on the tensors themselves; local KV heads hold a window, not the context."""
    model = make(prefill="dense")
    ids = torch.randint(3, 97, (2, 3000))
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert allocated_bytes(cache) == cache.nbytes()["total"]
    layer = cache.layers[0]
    assert layer.window_keys.shape[2] <= 2 + 8 + 64
    assert layer.keys.shape[1] == 2
    # 2 of 3 KV heads whole, an index of 3 x 8 16-bit numbers, a window
    ratio = cache.nbytes()["total"] / cache.dense_nbytes()
    assert ratio < (2 / 3 + 3 * 8 * 2 / (3 * 2 * 8 * 4)) * 1.05 + 0.01


def test_cache_grows_without_copying_every_step(model):
    ids = torch.randint(3, 97, (1, 40))
    cache = model.new_cache()
    moves, last = 0, None
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(300):
            model(ids[:, :1], past_key_values=cache)
            pointer = cache.layers[0].keys.data_ptr()
            moves += pointer != last
            last = pointer
    assert moves <= 4


@pytest.fixture(scope="module")
def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_pipeline_streamer_and_stop_strings(byte_tokenizer):
    model = make(vocab_size=len(byte_tokenizer))
    text = "A long enough prompt, with more than one window of tokens in it."
    inputs = byte_tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    expected = byte_tokenizer.decode(tokens)
    run = pipeline("text-generation", model=model, tokenizer=byte_tokenizer)
    outputs = run([text, text[:20]], batch_size=2, return_full_text=False, **GREEDY)
    assert outputs[0][0]["generated_text"] == expected
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True)
    model.generate(**inputs, streamer=streamer, **GREEDY)
    assert "".join(streamer) == expected
    stop = byte_tokenizer.decode(tokens[5:6])
    ended = model.generate(
        **inputs, stop_strings=[stop], tokenizer=byte_tokenizer, max_new_tokens=NEW, do_sample=False
    )[0, inputs["input_ids"].shape[1] :]
    assert len(ended) <= 6
    assert byte_tokenizer.decode(ended).endswith(stop)


def test_refusals(model, batch):
    ids, mask = batch
    with pytest.raises(ValueError, match=r"'quantized' is not supported.*kv_cache_dtype='int8'"):
        model.generate(ids, attention_mask=mask, cache_implementation="quantized", **GREEDY)
    # regression: nothing was generated, and the error was only logged
    with pytest.raises(ValueError, match=r"continuous batching .* needs a paged cache"):
        model.generate_batch([[5, 6, 7]])
    chunked = make("gemma3_text")
    layer_types = chunked.config.base_config.layer_types
    chunked.config.base_config.layer_types = ["hybrid_sliding", *layer_types[1:]]
    chunked.config.base_config.number_of_conv_states = 1
    with pytest.raises(ValueError, match="'gemma3_text': its 'hybrid_sliding' layers have no static form"):
        chunked.new_cache(max_length=100)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="this machine has no GPU"):
            model.generate(ids, attention_mask=mask, cache_implementation="offloaded", **GREEDY)
    full = model.new_cache(max_length=41)
    with torch.no_grad():
        model(ids[2:], past_key_values=full)
        with pytest.raises(ValueError, match="static cache has 41 slots and 42 are needed"):
            model(ids[2:, :1], past_key_values=full)
    with pytest.raises(ValueError, match="4-D mask"):
        model(ids, attention_mask=torch.zeros(3, 1, 41, 41))
    with pytest.raises(ValueError, match="needs its own cache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=torch.cat([torch.arange(20), torch.arange(21)])[None].expand(3, -1))
    with pytest.raises(ValueError, match="attention_mask must cover"):
        model(ids, attention_mask=mask[:, :-1])
    with pytest.raises(ValueError, match="attention mode"):
        model.attention_mode("fast").__enter__()
    with pytest.raises(ValueError, match="attention_backend"):
        model.set_attn_implementation("flash_attention_2")
    right = torch.ones_like(ids)
    right[0, 30:] = 0
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, attention_mask=right, past_key_values=cache)
        with pytest.raises(ValueError, match="right-padded"):
            model(ids[:, :1], past_key_values=cache)
