"""Where this package meets others, each module with the extra it needs: ``peft`` (Deep LoRA as a method of PEFT),
``peft_fused`` (PEFT's own LoRA layers on the fused op), ``transformers`` (optimizer and callbacks for its Trainer).
"""
