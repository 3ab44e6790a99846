# A quarter of the MACs, with the dense detector as teacher
_base_ = 'rtmdet_tiny_bccd_basis-macs50.py'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.25),
        # 192 of the 205 images
        calibration=dict(num_batches=24))
]

max_epochs, iterations = 20, 26  # an epoch: 205 images in batches of 8
param_scheduler = dict(
    end=max_epochs * iterations, T_max=max_epochs * iterations)
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
