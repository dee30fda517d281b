"""Run settings that every LazyConfig shares; see fiber_d2.engine.train.run_lazy_config."""

train = dict(
    output_dir="./output",
    # Weights to start from, or to evaluate with --eval-only; "" starts from random ones.
    init_checkpoint="",
    max_iter=90000,
    # Iterations between two evaluations; 0 evaluates at the end only.
    eval_period=5000,
    log_period=20,
    checkpointer=dict(period=5000, max_to_keep=3),
    # Batches of dataloader.train.total_batch_size images that an optimiser step averages over;
    # max_iter and all periods count optimiser steps.
    accumulate=1,
    # So many steps in a row whose loss is not finite end the training; they change no weights.
    max_nonfinite=10,
    # "cuda" means the CPU where there is no GPU.
    device="cuda",
    # Mixed precision; dtype "bfloat16" or "float16", None chooses what the device is good at.
    amp=dict(enabled=False, dtype=None),
    # Limit of the L2 norm of all gradients together; None does not clip.
    clip_grad=None,
    # Negative draws one.
    seed=0,
    # Test images drawn per data set: the first ones ("spread"), or so many of the best and so many
    # of the worst ("best_worst", as the option --vis).
    pictures=12,
    pictures_of="spread",
    # Check prompts and ground truth of the test sets before computing.
    self_check=True,
    # Go on from the predictions of an interrupted evaluation (the option --resume-eval).
    resume_eval=False,
    # Test-time augmentation: a node that lacks only the model, such as configs/common/tta.py's.
    tta=None,
    # CPU threads of each process; None leaves it to torch.
    threads=None,
)
