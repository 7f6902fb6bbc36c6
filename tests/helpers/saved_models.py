"""Small random Hugging Face models with their processors, saved to a folder as from_pretrained reads them."""

from pathlib import Path

import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 24, "patch_size": 6}
WORDS = ["<start>", "<end>", "<pad>", "a", "red", "blue", "square", "circle"]
MARKS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token="<pad>", model_max_length=8
    )


def image_processor():
    return transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 8, **MARKS}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    transformers.CLIPProcessor(image_processor(), tokenizer()).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5)).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 64, **MARKS}
    config = transformers.LlavaConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_id=len(words) - 1,
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor(),
        words,
        patch_size=6,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), pad_token_id=2, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A decoder of texts, whose tokenizer puts nothing around them."""
    from tokenizers import processors

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(WORDS), **MARKS)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    words.save_pretrained(folder)
    return folder
