"""CfgNode defaults: FIBER-B as pre-trained (fusion v2).

Every node under ``MODEL.FIBER`` holds the keyword arguments of one class, in upper case.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode


def keyword_arguments(node: CfgNode) -> dict[str, Any]:
    """``{"EMBED_DIM": 128, ...}`` to ``{"embed_dim": 128, ...}``."""
    return {key.lower(): value for key, value in node.items()}


def add_fiber_config(cfg: CfgNode) -> None:
    """Add the keys of FIBER to a Detectron2 default config, in place."""
    cfg.MODEL.FIBER = CfgNode()

    # fiber_d2.modeling.swin.SwinTransformer
    cfg.MODEL.FIBER.VISION = CfgNode()
    cfg.MODEL.FIBER.VISION.EMBED_DIM = 128
    cfg.MODEL.FIBER.VISION.DEPTHS = [2, 2, 18, 2]
    cfg.MODEL.FIBER.VISION.NUM_HEADS = [4, 8, 16, 32]
    cfg.MODEL.FIBER.VISION.WINDOW = 12
    # Per stage, how many of its last blocks exchange with the text tower.
    cfg.MODEL.FIBER.VISION.FUSED_BLOCKS = [0, 0, 4, 2]
    # True for v3, the variant of the referring-expression checkpoints.
    cfg.MODEL.FIBER.VISION.QUERY_NORM = False
    cfg.MODEL.FIBER.VISION.MLP_RATIO = 4.0
    cfg.MODEL.FIBER.VISION.DROP_PATH = 0.4
    cfg.MODEL.FIBER.VISION.PATCH_SIZE = 4
    # -1 trains everything; 2, as in pre-training, leaves patch embedding and stage 1 alone.
    cfg.MODEL.FIBER.VISION.FROZEN_STAGES = -1
    # Here, in TEXT and in TOWER: compute activations again in the backward pass, to save memory.
    cfg.MODEL.FIBER.VISION.CHECKPOINT = False

    # fiber_d2.modeling.roberta.RobertaEncoder
    cfg.MODEL.FIBER.TEXT = CfgNode()
    cfg.MODEL.FIBER.TEXT.VOCAB_SIZE = 50265
    cfg.MODEL.FIBER.TEXT.DIM = 768
    cfg.MODEL.FIBER.TEXT.NUM_LAYERS = 12
    cfg.MODEL.FIBER.TEXT.NUM_HEADS = 12
    cfg.MODEL.FIBER.TEXT.MLP_DIM = 3072
    cfg.MODEL.FIBER.TEXT.MAX_POSITIONS = 514
    cfg.MODEL.FIBER.TEXT.DROPOUT = 0.1
    cfg.MODEL.FIBER.TEXT.PAD_TOKEN_ID = 1
    cfg.MODEL.FIBER.TEXT.NORM_EPS = 1e-5
    # Rows of a learnt addition to the embeddings, for prompt tuning; 0 for none.
    cfg.MODEL.FIBER.TEXT.PROMPT_LENGTH = 0
    cfg.MODEL.FIBER.TEXT.CHECKPOINT = False

    # fiber_d2.modeling.fpn.FeaturePyramid
    cfg.MODEL.FIBER.NECK = CfgNode()
    cfg.MODEL.FIBER.NECK.OUT_CHANNELS = 256
    cfg.MODEL.FIBER.NECK.DROP_BLOCK = 0.3
    cfg.MODEL.FIBER.NECK.DROP_BLOCK_SIZE = 3

    # fiber_d2.modeling.dyhead.DynamicHead
    cfg.MODEL.FIBER.TOWER = CfgNode()
    cfg.MODEL.FIBER.TOWER.NUM_BLOCKS = 6
    cfg.MODEL.FIBER.TOWER.NORM_GROUPS = 16
    # "flat" reads offsets as the original's operator did; "resampled" is the geometric reading.
    cfg.MODEL.FIBER.TOWER.OFFSET_ADDRESSING = "flat"
    cfg.MODEL.FIBER.TOWER.ZERO_INIT_OFFSETS = True
    cfg.MODEL.FIBER.TOWER.CHECKPOINT = False

    # fiber_d2.modeling.boxes.AnchorGrid
    cfg.MODEL.FIBER.ANCHORS = CfgNode()
    cfg.MODEL.FIBER.ANCHORS.STRIDES = [8, 16, 32, 64, 128]
    cfg.MODEL.FIBER.ANCHORS.SIZES = [64, 128, 256, 512, 1024]

    # fiber_d2.modeling.losses.GroundingLoss
    cfg.MODEL.FIBER.LOSS = CfgNode()
    cfg.MODEL.FIBER.LOSS.FOCAL_ALPHA = 0.25
    cfg.MODEL.FIBER.LOSS.FOCAL_GAMMA = 2.0
    cfg.MODEL.FIBER.LOSS.BOX_WEIGHT = 2.0
    cfg.MODEL.FIBER.LOSS.ATSS_TOPK = 9

    # fiber_d2.modeling.postprocess.PostProcessor
    cfg.MODEL.FIBER.POSTPROCESS = CfgNode()
    cfg.MODEL.FIBER.POSTPROCESS.SCORE_THRESH = 0.05
    cfg.MODEL.FIBER.POSTPROCESS.PRE_NMS_TOPK = 1000
    cfg.MODEL.FIBER.POSTPROCESS.NMS_THRESH = 0.6
    cfg.MODEL.FIBER.POSTPROCESS.MAX_DETECTIONS = 100
    # "mean" over a target's tokens, or "max".
    cfg.MODEL.FIBER.POSTPROCESS.SCORE_AGGREGATION = "mean"
    # Detections per image after several prompts are merged; 0 keeps all of them.
    cfg.MODEL.FIBER.POSTPROCESS.MAX_MERGED_DETECTIONS = 0

    # Image-prompt pairs that pass the fused part together in evaluation.
    cfg.MODEL.FIBER.PROMPT_BATCH_SIZE = 16
    # Memory for what evaluation remembers of captions between images; 0 for none.
    cfg.MODEL.FIBER.TEXT_CACHE_MIB = 256
    # What torch.compile makes of the towers, the pyramid and the head: "inductor"; "" for nothing.
    cfg.MODEL.FIBER.COMPILE_BACKEND = ""
    # Evaluation in mixed precision, "bfloat16" or "float16"; "" is float32.
    cfg.MODEL.FIBER.INFERENCE_PRECISION = ""

    # Text: what the data side does with captions.
    cfg.FIBER = CfgNode()
    # Hub name, folder, tokenizer.json, or "shapes" for the bundled one.
    cfg.FIBER.TOKENIZER = "roberta-base"
    # Tokens of a caption, special tokens included.
    cfg.FIBER.MAX_TOKENS = 256
    cfg.FIBER.SEPARATOR = ". "

    # The run: keys of the node `train` in configs/common/train.py, in upper case. Where None is
    # allowed there, a node has the key ENABLED.
    cfg.FIBER.TRAIN = CfgNode()
    cfg.FIBER.TRAIN.LOG_PERIOD = 20
    # The period is SOLVER.CHECKPOINT_PERIOD.
    cfg.FIBER.TRAIN.CHECKPOINTER = CfgNode({"MAX_TO_KEEP": 3})
    # Batches of SOLVER.IMS_PER_BATCH images that an optimiser step averages over.
    cfg.FIBER.TRAIN.ACCUMULATE = 1
    cfg.FIBER.TRAIN.MAX_NONFINITE = 10
    # Rates and decays "published": by pieces of the original's names, with SOLVER.BIAS_LR_FACTOR
    # and WEIGHT_DECAY_BIAS; or "by_kind": by what parameters are, with WEIGHT_DECAY_NORM as well.
    cfg.FIBER.TRAIN.PARAM_GROUPS = CfgNode(
        {
            "RULES": "published",
            "TEXT_LR_FACTOR": 1.0,
            "VISION_LR_FACTOR": 1.0,
            "WEIGHT_DECAY_NORM_FACTOR": 1.0,
        }
    )
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    # SOLVER.LR_SCHEDULER_NAME may be "PlateauLR", which drops the rate by SOLVER.GAMMA when the
    # metric of BEST has not risen; MIN_LR is also the floor of "PublishedCosineLR".
    cfg.FIBER.TRAIN.PLATEAU = CfgNode({"PATIENCE": 3, "THRESHOLD": 1e-4, "MIN_LR": 1e-6})
    # Times SOLVER.GAMMA at RATIO times each of SOLVER.STEPS.
    cfg.FIBER.TRAIN.WEIGHT_DECAY_SCHEDULE = CfgNode({"ENABLED": False, "RATIO": 0.667})
    cfg.FIBER.TRAIN.EMA = CfgNode({"ENABLED": False, "DECAY": 0.999})
    # Which weights are evaluated, "model" or "ema".
    cfg.FIBER.TRAIN.WEIGHTS = "model"
    # A metric is written as DATASET/bbox/AP. The data sets of TEST_BEST are evaluated once, with
    # the best checkpoint.
    cfg.FIBER.TRAIN.BEST = CfgNode({"ENABLED": False, "METRIC": "", "MODE": "max"})
    cfg.FIBER.TRAIN.EARLY_STOP = CfgNode({"ENABLED": False, "PATIENCE": 8})
    cfg.FIBER.TRAIN.TEST_BEST = ()
    cfg.FIBER.TRAIN.START_CHECK = True
    cfg.FIBER.TRAIN.PICTURE_PERIOD = 5000
    # Further keys, in upper case, are arguments of wandb.init.
    cfg.FIBER.TRAIN.WANDB = CfgNode({"ENABLED": False, "PROJECT": "fiber_d2"}, new_allowed=True)
    # What learns, see fiber_d2.engine.tuning; "" leaves it to the model.
    cfg.FIBER.TRAIN.TUNING = ""
    # Images per step that rates and lengths are for (0: not said), and "linear" or "sqrt" to adapt
    # them to SOLVER.IMS_PER_BATCH, see fiber_d2.engine.scaling.
    cfg.FIBER.TRAIN.SCALING = CfgNode({"REFERENCE_BATCH_SIZE": 0, "RULE": ""})
    cfg.FIBER.TRAIN.TIMEOUT = 1800
    cfg.FIBER.TRAIN.DDP = CfgNode({"STATIC_GRAPH": False, "GRADIENT_AS_BUCKET_VIEW": True})

    cfg.MODEL.META_ARCHITECTURE = "FIBER"
    cfg.MODEL.BACKBONE.NAME = "build_fiber_fusion_backbone"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "ATSSLanguageHead"
    cfg.MODEL.MASK_ON = False
    # The pipeline reads BGR images in 0..255.
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
