#!/usr/bin/env bash
# The first hour on a new GPU: runs nearly every method for 60 steps, in several dtypes, resumes a run,
# measures times, and uses several GPUs if there are some. Start it in the folder of this repository,
# in the environment of README's quick start:
#
#   bash assets/gpu_check.sh              # DEVICE=cpu: without a GPU, in five minutes
#
# Each check prints one line. Please paste out/gpu_check/report.txt into an issue, even if all is ok.
device=${DEVICE:-cuda}
out=out/gpu_check
report=$out/report.txt
mkdir -p $out
: > $report
failures=0
export TORCH_LOGS=recompiles

# check NAME COMMAND...: runs a command, keeps its output, and prints its result
check() {
  local name=$1 log=$out/$1.txt start=$SECONDS word=ok
  shift
  if ! timeout 900 "$@" > "$log" 2>&1; then
    word=FAILED
    failures=$((failures + 1))
  fi
  # the last loss, or else the last line
  local result
  result=$(grep -E 'val_loss|val_acc' "$log" | tail -n 1 | tr -s ' ' | cut -c 1-60)
  [ $word = FAILED ] && result=$(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-100)
  printf '%-7s%-22s%5d s  %s\n' $word "$name" $((SECONDS - start)) "$result" | tee -a $report
}

# train NAME SCRIPT ARGUMENTS...: 60 steps, with an evaluation at both ends
train() {
  local name=$1 script=$2
  shift 2
  check "$name" python "$script" "$@" --device="$device" --out_dir=$out/"$name" --overwrite=True \
    --max_iters=60 --eval_interval=60 --eval_iters=5 --log_interval=20
}

python - "$device" <<'PYTHON' 2>&1 | tee -a $report
import platform, subprocess, sys, time, torch
device, gpu = sys.argv[1], sys.argv[1] == 'cuda'
commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
print('commit', commit.stdout.strip(), '| Python', platform.python_version(), '| torch',
      torch.__version__, '| CUDA', torch.version.cuda)
if gpu:
    p = torch.cuda.get_device_properties(0)
    print(f'{torch.cuda.device_count()} x {p.name}, capability {p.major}.{p.minor}, '
          f'{p.total_memory / 2**30:.1f} GiB; kernels for {" ".join(torch.cuda.get_arch_list())}')

def seconds(f, count):
    for repeat in range(2):  # the first one warms up
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            f()
        if gpu:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / count

x, size = torch.zeros(1, device=device), 4096 if gpu else 1024
print(f'one launch: {1e6 * seconds(lambda: x.add_(1), 1000):.1f} us')
y = torch.zeros(2**26, device=device)
print(f'memory: {2 * y.nbytes / seconds(lambda: y.add_(1), 5) / 1e9:.0f} GB/s')
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    a = torch.randn(size, size, device=device).to(dtype)
    print(f'product in {dtype}: {2 * size**3 / seconds(lambda: a @ a, 5) / 1e12:.2f} TFLOP/s')
PYTHON

bf16='--param_dtype=bfloat16 --dtype=bfloat16 --gradient_checkpointing=True'
for file in config/methods/*.py; do
  method=$(basename "$file" .py)
  case $method in local_*|*_2bit) continue ;; esac  # for several processes, see below
  train "gpt_$method" train_gpt.py config/quickstart.py "$file"
done
for method in adamw lora galore_lean galore_int8 muon_lean muon_int8 adafactor_int8; do
  # shellcheck disable=SC2086  # $bf16 is several arguments
  train "llama_bf16_$method" train_llama.py config/llama_quickstart.py config/methods/$method.py $bf16
done
check vit_adamw python train_vit.py config/vit_quickstart.py --epochs=3 \
  --device="$device" --out_dir=$out/vit_adamw --overwrite=True
check vit_lora python train_vit.py config/vit_digits_adapt.py config/methods/lora.py --epochs=3 \
  --init_from=$out/vit_adamw/best.pt --device="$device" --out_dir=$out/vit_lora --overwrite=True
for method in lora galore; do
  train "gpt_float16_$method" train_gpt.py config/quickstart.py config/methods/$method.py --dtype=float16
done
train gpt_eager_galore train_gpt.py config/quickstart.py config/methods/galore.py --compile=False
check gpt_resumed_galore python train_gpt.py config/quickstart.py config/methods/galore.py \
  --device="$device" --out_dir=$out/gpt_galore --init_from=resume --max_iters=70 --eval_iters=5

# times: each method relative to AdamW
speed() {
  check "$@"
  grep -E '^[a-z_]+ .* [0-9.,]+$|ms per step' "$out/$1.txt" | tee -a $report
}
methods='config/methods/adamw.py config/methods/mhlora.py config/methods/galore.py config/methods/muon.py'
# shellcheck disable=SC2086
if [ "$device" = cpu ]; then
  speed speed_gpt python bench.py speed train_gpt.py config/quickstart.py $methods --device=cpu
else
  # one step of real sizes; two methods at a time share the memory
  for method in mhlora lte galore galore_lean muon; do
    speed "speed_gpt2_$method" python bench.py speed train_gpt.py config/gpt2.py config/methods/adamw.py \
      config/methods/$method.py --batch_size=8 --gradient_accumulation_steps=1 --device="$device"
  done
  for method in galore galore_lean muon; do
    speed "speed_llama_60m_$method" python bench.py speed train_llama.py config/llama_60m.py \
      config/methods/adamw.py config/methods/$method.py --batch_size=32 \
      --gradient_accumulation_steps=1 --device="$device"
  done
fi

# several GPUs, or two processes on the CPU
gpus=2
[ "$device" = cuda ] && gpus=$(nvidia-smi -L | wc -l)
if [ "$gpus" -gt 1 ]; then
  several() {  # NAME METHOD ARGUMENTS...
    local name=$1 method=$2
    shift 2
    check "${gpus}_$name" torchrun --standalone --nproc_per_node="$gpus" train_gpt.py \
      config/quickstart.py config/methods/"$method".py --device="$device" --overwrite=True \
      --out_dir=$out/"several_$name" --max_iters=60 --eval_interval=60 --eval_iters=5 \
      --batch_size=$((4 * gpus)) "$@"
  }
  several processes_galore galore
  several processes_lte lte --lora_heads="$gpus"
  several processes_local_muon local_muon
  several processes_galolte_2bit galolte_2bit --lora_heads="$gpus"
  several shards_galore galore --fsdp=True
fi

echo "recompilations: $(cat $out/*.txt | grep -c 'Recompiling function')" | tee -a $report
echo "$failures checks failed; the outputs are in $out" | tee -a $report
exit $((failures > 0))
