"""A tokenizer made on the spot and two tiny text encoders for it, of the classes FLUX uses."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

MAX_LENGTH = 24
WIDTH = 128


def build_tokenizer(texts, vocab_size=1536):
    """Fit a lower-casing byte-pair tokenizer on ``texts``; prompts are cut at ``MAX_LENGTH``."""
    end_of_word = "</w>"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix=end_of_word))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        padding_side="right",
    )


def tokenize(tokenizer, texts):
    """Token ids [B, MAX_LENGTH], padded as FluxPipeline pads them."""
    return tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def build_clip(vocab_size):
    """One-layer CLIP text model; FLUX reads only its pooled output, taken at ``</s>``."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    return model


def build_t5(vocab_size):
    """Two-layer T5 encoder; its large initial embeddings let labels part early in training."""
    model = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model
