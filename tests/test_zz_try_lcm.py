import sys, time; sys.path.insert(0,'/work/main/tests')
from test_training_lcm import *
def test_try(taught, encoder, tmp_path):
    import os
    t0=time.time()
    truth=PATTERNS[torch.arange(32)%2]
    teach=sampled(taught.module,encoder,20,'ddim',GUIDANCE)
    def show(n,x): print(n,'to truth',(x-truth).square().mean().item(),'to teacher mean',(x-teach).square().mean().item())
    show('teacher',teach)
    for st,sa,g in ((20,'ddpm',GUIDANCE),(20,'ddpm',1.),(2,'ddim',GUIDANCE),(2,'lcm',1.),(4,'lcm',1.),(2,'lcm',GUIDANCE),(1,'lcm',1.)): show((st,sa,g),sampled(taught.module,encoder,st,sa,g))
    run=settings(tmp_path)
    o=objective_of(run,taught,encoder); f=[]
    Trainer(o,Pictures(encoder),run,SingleProcess('cpu'),lambda s:f.append((s.loss,s.figures['clean_mse']))).run()
    print(f[::10], time.time()-t0)
    for st,sa,g in ((2,'lcm',1.),(4,'lcm',1.),(1,'lcm',1.)): show((st,sa,g),sampled(o.module,encoder,st,sa,g))
