"""Fields of the original's configuration: what each is here, and what has no counterpart."""

from __future__ import annotations

from typing import Any

# What the original takes where a file says nothing, for fields that decide something here.
DEFAULTS: dict[str, Any] = {
    "AUGMENT.FLIP_PROB_TRAIN": 0.5,
    "AUGMENT.MULT_MIN_SIZE_TRAIN": (),
    "DATALOADER.ASPECT_RATIO_GROUPING": True,
    "DATASETS.CAPTION_PROMPT": None,
    "DATASETS.COCO_COPY": 1,
    "DATASETS.CONTROL_PROB": (),
    "DATASETS.DISABLE_SHUFFLE": False,
    "DATASETS.FEW_SHOT": 0,
    "DATASETS.FLICKR_COPY": 1,
    "DATASETS.FLICKR_GT_TYPE": "separate",
    "DATASETS.GENERAL_COPY": -1,
    "DATASETS.LVIS_COPY": 1,
    "DATASETS.MIXED_COPY": 1,
    "DATASETS.OVERRIDE_CATEGORY": None,
    "DATASETS.RANDOM_SAMPLE_NEG": -1,
    "DATASETS.SEPARATION_TOKENS": " ",
    "DATASETS.TEST": (),
    "DATASETS.TRAIN": (),
    "DATASETS.USE_CAPTION_PROMPT": False,
    "DATASETS.USE_OVERRIDE_CATEGORY": False,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MIN_SIZE_TRAIN": 800,
    "INPUT.PIXEL_MEAN": (102.9801, 115.9465, 122.7717),
    "INPUT.PIXEL_STD": (1.0, 1.0, 1.0),
    "MODEL.ATSS.DETECTIONS_PER_IMG": 100,
    "MODEL.ATSS.INFERENCE_TH": 0.05,
    "MODEL.ATSS.NMS_TH": 0.6,
    "MODEL.ATSS.PRE_NMS_TOP_N": 1000,
    "MODEL.ATSS.REG_LOSS_WEIGHT": 2.0,
    "MODEL.ATSS.TOPK": 9,
    "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": 2,
    "MODEL.BACKBONE.FUSION_VERSION": "v1",
    "MODEL.BACKBONE.OUT_CHANNELS": 1024,
    "MODEL.BACKBONE.USE_CHECKPOINT": False,
    "MODEL.DYHEAD.CHANNELS": 128,
    "MODEL.DYHEAD.FUSE_CONFIG.TOKEN_ALPHA": 0.25,
    "MODEL.DYHEAD.FUSE_CONFIG.TOKEN_GAMMA": 2.0,
    "MODEL.DYHEAD.NUM_CONVS": 4,
    "MODEL.DYHEAD.SCORE_AGG": "MEAN",
    "MODEL.DYHEAD.USE_CHECKPOINT": False,
    "MODEL.FPN.DROP_BLOCK": True,
    "MODEL.FPN.DROP_PROB": 0.3,
    "MODEL.GROUP_NORM.NUM_GROUPS": 16,
    "MODEL.LANGUAGE_BACKBONE.FREEZE": False,
    "MODEL.LANGUAGE_BACKBONE.LANG_DIM": 768,
    "MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN": 256,
    "MODEL.LANGUAGE_BACKBONE.TOKENIZER_TYPE": "bert-base-uncased",
    "MODEL.RPN.ANCHOR_SIZES": (32, 64, 128, 256, 512),
    "MODEL.RPN.ANCHOR_STRIDE": (16,),
    "MODEL.SWINT.DEPTHS": (2, 2, 6, 2),
    "MODEL.SWINT.DROP_PATH_RATE": 0.2,
    "MODEL.SWINT.EMBED_DIM": 96,
    "MODEL.SWINT.MLP_RATIO": 4,
    "MODEL.SWINT.NUM_HEADS": (3, 6, 12, 24),
    "MODEL.SWINT.OUT_CHANNELS": (96, 192, 384, 768),
    "MODEL.SWINT.WINDOW_SIZE": 7,
    "MODEL.WEIGHT": "",
    "SOLVER.AUTO_TERMINATE_PATIENCE": -1,
    "SOLVER.BACKBONE_BODY_LR_FACTOR": 1.0,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.BIAS_LR_FACTOR": 2,
    "SOLVER.CHECKPOINT_PER_EPOCH": -1.0,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.LANG_LR": 0.00001,
    "SOLVER.MAX_EPOCH": 0,
    "SOLVER.MAX_ITER": 40000,
    "SOLVER.MIN_LR": 0.000001,
    "SOLVER.MODEL_EMA": 0.0,
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.STEPS": (30000,),
    "SOLVER.STEP_PATIENCE": 5,
    "SOLVER.TUNING_HIGHLEVEL_OVERRIDE": None,
    "SOLVER.USE_AMP": False,
    "SOLVER.USE_AUTOSTEP": False,
    "SOLVER.USE_COSINE": False,
    "SOLVER.WARMUP_FACTOR": 1.0 / 3,
    "SOLVER.WARMUP_ITERS": 500,
    "SOLVER.WEIGHT_DECAY": 0.0005,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.WEIGHT_DECAY_NORM_FACTOR": 1.0,
    "SOLVER.WEIGHT_DECAY_SCHEDULE": False,
    "SOLVER.WEIGHT_DECAY_SCHEDULE_RATIO": 0.667,
    "TEST.CHUNKED_EVALUATION": -1,
}

# Fields that are one key here, with the same value.
SAME: dict[str, str] = {
    "MODEL.ATSS.DETECTIONS_PER_IMG": "model.head.postprocessor.max_detections",
    "MODEL.ATSS.INFERENCE_TH": "model.head.postprocessor.score_thresh",
    "MODEL.ATSS.NMS_TH": "model.head.postprocessor.nms_thresh",
    "MODEL.ATSS.PRE_NMS_TOP_N": "model.head.postprocessor.pre_nms_topk",
    "MODEL.ATSS.REG_LOSS_WEIGHT": "model.head.loss.box_weight",
    "MODEL.ATSS.TOPK": "model.head.loss.atss_topk",
    "MODEL.BACKBONE.OUT_CHANNELS": "model.backbone.neck.out_channels",
    "MODEL.DYHEAD.CHANNELS": "model.head.tower.channels",
    "MODEL.DYHEAD.FUSE_CONFIG.TOKEN_ALPHA": "model.head.loss.focal_alpha",
    "MODEL.DYHEAD.FUSE_CONFIG.TOKEN_GAMMA": "model.head.loss.focal_gamma",
    "MODEL.DYHEAD.NUM_CONVS": "model.head.tower.num_blocks",
    "MODEL.GROUP_NORM.NUM_GROUPS": "model.head.tower.norm_groups",
    "MODEL.LANGUAGE_BACKBONE.LANG_DIM": "model.backbone.text.dim",
    "MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN": "protocol.max_tokens",
    "MODEL.LANGUAGE_BACKBONE.TOKENIZER_TYPE": "protocol.tokenizer",
    "MODEL.RPN.ANCHOR_SIZES": "model.head.anchors.sizes",
    "MODEL.RPN.ANCHOR_STRIDE": "model.head.anchors.strides",
    "MODEL.SWINT.DEPTHS": "model.backbone.vision.depths",
    "MODEL.SWINT.EMBED_DIM": "model.backbone.vision.embed_dim",
    "MODEL.SWINT.MLP_RATIO": "model.backbone.vision.mlp_ratio",
    "MODEL.SWINT.NUM_HEADS": "model.backbone.vision.num_heads",
    "MODEL.SWINT.WINDOW_SIZE": "model.backbone.vision.window",
    "INPUT.MAX_SIZE_TEST": "protocol.max_size",
    "INPUT.MIN_SIZE_TEST": "protocol.short_edge_length",
    "INPUT.PIXEL_MEAN": "model.pixel_mean",
    "INPUT.PIXEL_STD": "model.pixel_std",
}
# The same, of trainings only.
SAME_IN_TRAINING: dict[str, str] = {
    "DATALOADER.ASPECT_RATIO_GROUPING": "dataloader.train.aspect_ratio_grouping",
    "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": "model.backbone.vision.frozen_stages",
    "MODEL.BACKBONE.USE_CHECKPOINT": "model.backbone.vision.checkpoint",
    "MODEL.DYHEAD.USE_CHECKPOINT": "model.head.tower.checkpoint",
    "MODEL.SWINT.DROP_PATH_RATE": "model.backbone.vision.drop_path",
    "SOLVER.BACKBONE_BODY_LR_FACTOR": "optimizer.params.vision_lr_factor",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.BIAS_LR_FACTOR": "optimizer.params.bias_lr_factor",
    "SOLVER.USE_AMP": "train.amp.enabled",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.WEIGHT_DECAY_BIAS": "optimizer.params.weight_decay_bias",
    "SOLVER.WEIGHT_DECAY_NORM_FACTOR": "optimizer.params.weight_decay_norm_factor",
}

# What FIBER always is. Another value is another model, or an experiment that was not published.
FIXED: dict[str, Any] = {
    "DATALOADER.SIZE_DIVISIBILITY": 32,
    "DATASETS.ADD_DET_PROMPT": False,
    "DATASETS.ADD_DET_PROMPT_ADVANCED": False,
    "DATASETS.ALTERNATIVE_TRAINING": False,
    "DATASETS.CLASS_AGNOSTIC": False,
    "DATASETS.CLASS_CONCAT": False,
    "DATASETS.MULTISTAGE_TRAINING": False,
    "DATASETS.ONE_HOT": False,
    "DATASETS.USE_CROWD": False,
    "DATASETS.USE_OD_AUG": False,
    "DATASETS.USE_SUPRESS_QUERY": False,
    "MODEL.BACKBONE.CONV_BODY": "SWINT-FPN-RETINANET",
    "MODEL.DYHEAD.LOG_SCALE": 0.0,
    "MODEL.DYHEAD.USE_DFCONV": True,
    "MODEL.DYHEAD.USE_DYFUSE": True,
    "MODEL.DYHEAD.USE_DYRELU": True,
    "MODEL.DYHEAD.USE_GN": True,
    "MODEL.DYHEAD.FUSE_CONFIG.EARLY_FUSE_ON": False,
    "MODEL.DYHEAD.FUSE_CONFIG.DOT_PRODUCT_TOKEN_LOSS_WEIGHT": 1.0,
    "MODEL.DYHEAD.FUSE_CONFIG.TYPE": "NONE",
    "MODEL.DYHEAD.FUSE_CONFIG.USE_CLASSIFICATION_LOSS": False,
    "MODEL.DYHEAD.FUSE_CONFIG.USE_CONTRASTIVE_ALIGN_LOSS": False,
    "MODEL.DYHEAD.FUSE_CONFIG.USE_DOT_PRODUCT_TOKEN_LOSS": True,
    "MODEL.DYHEAD.FUSE_CONFIG.USE_FUSED_FEATURES_DOT_PRODUCT": False,
    "MODEL.DYHEAD.FUSE_CONFIG.USE_TOKEN_LOSS": False,
    "MODEL.FPN.DROP_SIZE": 3,
    "MODEL.LANGUAGE_BACKBONE.MASK_SPECIAL": False,
    "MODEL.LANGUAGE_BACKBONE.MODEL_TYPE": "roberta-fused-v2",
    "MODEL.META_ARCHITECTURE": "GeneralizedVLRCNN",
    "MODEL.RPN.ASPECT_RATIOS": (1.0,),
    "MODEL.RPN.SCALES_PER_OCTAVE": 1,
    "MODEL.RPN.USE_FPN": True,
    "MODEL.RPN_ARCHITECTURE": "VLDYHEAD",
    "MODEL.RPN_ONLY": True,
    "MODEL.SWINT.VERSION": "fusion",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.WARMUP_METHOD": "linear",
    "TEST.SUBSET": -1,
    "TEST.USE_MULTISCALE": False,
}

# What changes no number here, or did not in the original: a field, or with a full stop at its end a
# section in which the original reads nothing else, and why.
INERT: dict[str, str] = {
    "AUGMENT.": "the original never uses it",
    "MODEL.FCOS.": "of another detector",
    "MODEL.RETINANET.": "of another detector",
    "MODEL.ROI_BOX_HEAD.": "of another detector",
    "MODEL.ROI_HEADS.": "of another detector",
    "MODEL.ROI_MASK_HEAD.": "of another detector",
}


def _inert(reason: str, *names: str) -> None:
    INERT.update(dict.fromkeys(names, reason))


_inert(
    "of data sets or captions that FIBER does not train on",
    *(
        f"DATASETS.{name}"
        for name in "BOX_THRESHOLD CAPTION_CONF CAPTION_FORMAT_VERSION CAPTION_MIN_BOX CAPTION_NMS "
        "FURTHER_SCREEN INFERENCE_CAPTION IN_COPY OI_COPY PACK_RANDOM_CAPTION_NUMBER "
        "SAFEGUARD_POSITIVE_CAPTION VG_COPY".split()
    ),
)
_inert(
    "has no effect in the original",
    *(
        f"DATASETS.{name}"
        for name in "FULL_QUESTION_PROB LOCAL_DEBUG MAX_BOX NEG_QUESTION_PROB "
        "NO_MINUS_ONE_FOR_ONE_HOT POS_QUESTION_PROB PREDEFINED_TEXT PROMPT_LIMIT_NEG "
        "REPLACE_CLEAN_LABEL USE_COCO_FORMAT".split()
    ),
    "MODEL.LANGUAGE_BACKBONE.USE_CHECKPOINT",
)
_inert(
    "of losses that FIBER does not have",
    "MODEL.DYHEAD.FUSE_CONFIG.CONTRASTIVE_ALIGN_LOSS_WEIGHT",
    "MODEL.DYHEAD.FUSE_CONFIG.CONTRASTIVE_HIDDEN_DIM",
    "MODEL.DYHEAD.FUSE_CONFIG.TOKEN_LOSS_WEIGHT",
    "MODEL.DYHEAD.FUSE_CONFIG.USE_LAYER_SCALE",
)
_inert(
    "a guard against numbers that float16 cannot hold",
    "MODEL.DYHEAD.FUSE_CONFIG.CLAMP_BERTATTN_MAX_FOR_OVERFLOW",
    "MODEL.DYHEAD.FUSE_CONFIG.CLAMP_BERTATTN_MIN_FOR_UNDERFLOW",
    "MODEL.DYHEAD.FUSE_CONFIG.CLAMP_DOT_PRODUCT",
    "MODEL.DYHEAD.FUSE_CONFIG.CLAMP_MAX_FOR_OVERFLOW",
    "MODEL.DYHEAD.FUSE_CONFIG.CLAMP_MIN_FOR_UNDERFLOW",
)
_inert(
    "classes and phrases are counted in the data",
    "MODEL.ATSS.NUM_CLASSES",
    "MODEL.DYHEAD.NUM_CLASSES",
    "TEST.MDETR_STYLE_AGGREGATE_CLASS_NUM",
)
_inert(
    "when a training saves and evaluates does not change it: train.checkpointer.period, "
    "train.eval_period",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.DURING_TRAINING",
)
_inert(
    "the kind of data is registered, not read from its name",
    "DATASETS.TEST_DATASETNAME_SUFFIX",
    "DATASETS.TRAIN_DATASETNAME_SUFFIX",
    "TEST.EVAL_TASK",
)
_inert(
    "of test-time augmentation, which TEST.USE_MULTISCALE turns on",
    *(
        f"TEST.{name}"
        for name in "FLIP MAX_SIZE NUM_CLASSES PRE_NMS_TOP_N RANGES SCALES SELECT_CLASSES "
        "SPECIAL_NMS TH".split()
    ),
)
_inert("nothing is downloaded", "DATASETS.PREDOWNLOAD_BING", "DATASETS.PREDOWNLOAD_WITH_AZCOPY")
INERT.update(
    {
        "DATALOADER.DISTRIBUTE_CHUNK_AMONG_NODE": "the original's own distribution of files",
        "DATALOADER.NUM_WORKERS": "a matter of the machine: dataloader.train.num_workers",
        "DATASETS.DISABLE_CLIP_TO_IMAGE": "boxes are always clipped to the image",
        "DATASETS.GENERAL_COPY_TEST": "images are tested once",
        "DATASETS.LVIS_USE_NORMAL_AP": "both kinds of AP are computed",
        "DATASETS.OBJECT365_COPY": "has no effect on object365_dt_train in the original",
        "DATASETS.SHUFFLE_SEED": "the original ignores it where it fine-tunes; here "
        "dataloader.train.few_shot_seed chooses the images of few shots",
        "DATASETS.SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING": "LVIS's recipe samples classes so",
        "MODEL.DYHEAD.TOPK": "has no effect in the original: MODEL.ATSS.TOPK is used",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "has no effect in the original: the norm is L2",
        "SOLVER.FIND_UNUSED_PARAMETERS": "all parameters take part in every step",
        "SOLVER.MOMENTUM": "has no effect on AdamW",
        "SOLVER.SEED": "orders of images are drawn otherwise: train.seed",
        "SOLVER.TEST_WITH_INFERENCE": "evaluation is always by inference",
        "SOLVER.USE_EMA_FOR_MONITOR": "train.weights says which weights are evaluated",
        "TENSORBOARD_EXP": "curves are in <output_dir>/tensorboard",
        "TEST.IMS_PER_BATCH": "does not change results: protocol.batch_size is per process",
    }
)
