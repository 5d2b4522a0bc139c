"""Tiny random Janus and CLIP models with a word tokenizer, for tests without network or weights."""

import re

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (
    "a red blue green big small ball box dog cat on under of and what shows image sentences "
    "Describe in one or two an this User Assistant left right"
).split()


SPECIAL = ["pad", "bos", "eos"]


def make_tokenizer():
    """Return a tokenizer that splits at spaces and punctuation, one id per word."""
    special = "<pad> <bos> <eos> <unk> <begin_of_image> < > | : . |>: <| |>".split()
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        extra_special_tokens={"boi_token": "<begin_of_image>"},
        **{f"{name}_token": f"<{name}>" for name in SPECIAL},
    )


def special_ids(tokenizer):
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in SPECIAL}


def language_config(tokenizer, **more):
    """The settings of a Llama of two layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(vocab_size=len(tokenizer), **special_ids(tokenizer))
    return transformers.LlamaConfig(**sizes, **more)


def make_janus(seed=0, codes=24, side=3, scale=8.0):
    """Return a random Janus with side * side image tokens and `codes` codes. Weight matrices of the
    policy are scaled up, so that distributions are far from uniform and mistakes show."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = language_config(tokenizer, num_key_value_heads=2, max_position_embeddings=256)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=32)
    sizes |= dict(image_size=4 * side, patch_size=4, num_image_tokens=side * side, depth=1)
    vision = transformers.JanusVisionConfig(**sizes)
    sizes = dict(embed_dim=8, num_embeddings=codes, latent_channels=32, base_channels=32)
    sizes |= dict(channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=32)
    vq = transformers.JanusVQVAEConfig(**sizes, image_token_embed_dim=32, num_hidden_layers=2)
    config = transformers.JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        tie_word_embeddings=False,
        image_token_id=tokenizer.unk_token_id,
    )
    model = transformers.JanusForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if re.search("language_model|lm_head|generation", name) and weight.dim() > 1:
            weight.data *= scale
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 3  # plans of all lengths
    model.generation_config.update(**special_ids(tokenizer))
    return model, tokenizer


def teach_palette(model, steps=150):
    """Teach the decoder that code c paints its cell: red if c is a multiple of 3, else blue."""
    side, codes = model.model.vqmodel.quantize.quant_state_dims[0], model.config.vq_config
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    part = model.model.vqmodel.requires_grad_(True)
    optimizer, g = torch.optim.Adam(part.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(codes.num_embeddings, (16, side * side), generator=g)
        image = model.decode_image_tokens(ids)  # (16, h, w, 3)
        cells = colours[ids % 3].view(16, side, side, 3)
        target = cells.repeat_interleave(image.shape[1] // side, 1)
        target = target.repeat_interleave(image.shape[1] // side, 2)
        loss = (image - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    part.requires_grad_(False)
    return loss.item()


def make_clip(seed=0):
    """Return a random CLIP and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(layers, vocab_size=len(tokenizer), max_position_embeddings=16)
    config = transformers.CLIPConfig(
        text_config=text | special_ids(tokenizer),
        vision_config=dict(layers, image_size=8, patch_size=4),
        projection_dim=8,
    )
    return transformers.CLIPModel(config), tokenizer


def save(folder, model, tokenizer):
    """Save both to a folder and return it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
