"""Jobs to render: one of each kind as small as can be, one that uses everything."""

from typing import Any

import yaml

from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.kinds import parse_job

UID = "1f0c9a2b-0000-4000-8000-000000000000"

SMALL = """
apiVersion: kubetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: small, namespace: team-a}
spec:
  model: {hub: {repo: HuggingFaceTB/SmolLM2-135M-Instruct}}
  dataset: {sources: [{name: alpaca, hub: {repo: tatsu-lab/alpaca}}]}
  training: {epochs: 1}
  workspace: {uri: "pvc://runs/kubetune"}
  outputs: [{name: merged, type: HuggingFace}]
"""

EVERYTHING = """
apiVersion: kubetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: everything, namespace: team-a}
spec:
  model:
    uri: {location: "s3://models/smollm2", s3: {endpoint: "https://other:9000", credentialsSecret: {name: other}}}
  dataset:
    sources:
    - {name: tickets, uri: {location: "s3://data/train.jsonl"}, weight: "2.5"}
    - {name: alpaca, hub: {repo: tatsu-lab/alpaca, config: default, tokenSecret: {name: hf, key: token}}}
    - {name: small, configMap: {name: samples, key: data.jsonl}, format: PromptCompletion, columns: {prompt: question}}
    validation: {sources: [{name: held-out, uri: {location: "pvc://held-out/v.jsonl"}, weight: "0.5"}]}
    chatTemplate: "{{ messages }}"
    maxSequenceLength: 512
    packing: None
    trainOn: LastAssistant
  lora:
    rank: 8
    alpha: 16
    dropout: "0.1"
    targetModules: [q_proj, v_proj]
    rankStabilized: true
    learningRateRatio: "16"
    trainTokens: ["<|tool|>"]
  training:
    maxSteps: 100
    globalBatchSize: 64
    microBatchSize: 2
    learningRate: "2e-4"
    weightDecay: "1e-5"
    validateEverySteps: 20
    profile: {startStep: 5, numSteps: 3, memory: true}
    activationCheckpointing: Selective
    compile: Blocks
    optimizer: AdamW8bit
    precision: BF16
    stochasticRounding: true
    parallelism: {replicate: 2}
    cpuOffload: true
  compute:
    nodes: 2
    accelerator: {resource: nvidia.com/gpu, perNode: 8}
    resources: {requests: {cpu: 4, memory: 32Gi}, limits: {memory: 64Gi}}
    nodeSelector: {pool: gpu}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    affinity: {requiredNodeLabels: [{key: topology.kubernetes.io/zone, operator: In, values: [a, b]}]}
    priorityClassName: high
    env:
    - {name: NCCL_DEBUG, value: INFO}
    - {name: SECRET, secretKeyRef: {name: env, key: value}}
    volumes:
    - {name: models, persistentVolumeClaim: {claimName: models, readOnly: true}}
    - {name: fast, emptyDir: {sizeLimit: 10Gi}}
    volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
    - {name: fast, mountPath: /fast}
    serviceAccountName: trainer
    sharedMemoryBytes: 8589934592
  storage:
    s3:
      endpoint: "https://s3:9000"
      region: eu-1
      credentialsSecret: {name: s3}
      caBundle: {configMap: {name: ca, key: ca.crt}}
  workspace: {uri: "s3://runs/team/"}
  checkpoint: {everySteps: 20, everySeconds: 900, keep: 2, mode: Sync, resumeFrom: {uri: "s3://runs/old/checkpoints"}}
  outputs:
  - {name: merged, type: HuggingFace, uri: "s3://models/out", dtype: BF16}
  - {name: adapter, type: PEFT}
  - {name: edge, type: GGUF, gguf: {type: Q8_0}}
  - {name: phone, type: ExecuTorch, scheme: Int8DynamicActivationInt4Weight, execuTorch: {maxSequenceLength: 256}}
  - {name: served, type: CompressedTensors, scheme: Int4WeightOnly, groupSize: 64}
  pushToHub: {repo: team/bot, output: merged, private: false, tokenSecret: {name: hf, key: write}}
  tracking:
    wandb:
      {project: bots, entity: team, group: night, tags: [a], apiKeySecret: {name: wandb, key: api}, baseUrl: "https://w"}
    mlflow: {trackingUri: "https://mlflow:5000", experiment: bots, tokenSecret: {name: mlflow, key: token}}
    tensorboard: {}
  lifecycle: {maxRestarts: 5, gracePeriodSeconds: 60, hangTimeoutSeconds: 900}
"""

CUSTOM = """
apiVersion: kubetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: custom, namespace: team-a}
spec:
  model: {hub: {repo: HuggingFaceTB/SmolLM2-135M-Instruct}}
  dataset: {sources: [{name: small, configMap: {name: samples, key: data.jsonl}}]}
  recipe: Custom
  custom: {script: {configMap: {name: focal, key: focal.py}}, args: ["--gamma", "2.0"]}
  training: {epochs: 1}
  compute: {nodes: 2}
  workspace: {uri: "pvc://runs/kubetune"}
  outputs: [{name: merged, type: HuggingFace}]
"""

EVAL_SMALL = """
apiVersion: kubetune.dev/v1alpha1
kind: EvalJob
metadata: {name: small, namespace: team-a}
spec:
  model: {hub: {repo: HuggingFaceTB/SmolLM2-135M-Instruct}}
  tasks: [{name: hellaswag}]
  workspace: {uri: "pvc://runs/kubetune"}
"""

EVAL_EVERYTHING = """
apiVersion: kubetune.dev/v1alpha1
kind: EvalJob
metadata: {name: everything, namespace: team-a}
spec:
  model: {jobRef: {name: tuned}}
  tasks:
  - {name: hellaswag, numFewshot: 0, limit: 200}
  - {name: tickets, numFewshot: 3}
  taskFiles:
  - {name: mine, configMap: {name: tasks}}
  - {name: shared, uri: {location: "s3://data/tasks", s3: {credentialsSecret: {name: other}}}}
  batchSize: 32
  maxSequenceLength: 1024
  applyChatTemplate: true
  systemInstruction: Be brief.
  seed: 7
  gates:
  - {name: floor, task: hellaswag, metric: acc_norm, atLeast: "0.40"}
  - {name: ceiling, task: tickets, metric: word_perplexity, filter: strict-match, atMost: "1.2e1"}
  - {name: as-good, task: hellaswag, metric: acc_norm, comparedTo: {name: base, maxDrop: "0.01"}}
  - {name: as-low, task: tickets, metric: word_perplexity, comparedTo: {name: base, maxIncrease: "0.5"}}
  compute: {nodes: 2, accelerator: {perNode: 4}}
  storage: {s3: {credentialsSecret: {name: s3}, caBundle: {configMap: {name: ca, key: ca.crt}}}}
  workspace: {uri: "s3://runs/team"}
  after: [{kind: QuantizeJob, name: first, condition: GatePassed}]
"""

QUANTIZE_SMALL = """
apiVersion: kubetune.dev/v1alpha1
kind: QuantizeJob
metadata: {name: small, namespace: team-a}
spec:
  model: {hub: {repo: HuggingFaceTB/SmolLM2-135M-Instruct}}
  outputs: [{name: int8, type: CompressedTensors, scheme: Int8WeightOnly}]
  workspace: {uri: "pvc://runs/kubetune"}
"""

QUANTIZE_EVERYTHING = """
apiVersion: kubetune.dev/v1alpha1
kind: QuantizeJob
metadata: {name: everything, namespace: team-a}
spec:
  model: {jobRef: {name: tuned, output: merged}}
  outputs:
  - {name: int4, type: CompressedTensors, scheme: Int4WeightOnly, groupSize: 128}
  - {name: ao, type: TorchAO, scheme: NF4}
  - {name: gguf, type: GGUF, gguf: {type: Q4_0}, uri: "s3://models/gguf"}
  - {name: pte, type: ExecuTorch}
  calibration:
    dataset:
      sources: [{name: a, uri: {location: "s3://data/a.jsonl"}, weight: "2.5"}, {name: b, hub: {repo: a/b}}]
      maxSequenceLength: 512
      packing: None
    samples: 16
    method: GPTQ
  verify:
    dataset:
      sources: [{name: v, configMap: {name: held-out, key: v.jsonl}, weight: "0.5"}]
      maxSequenceLength: 512
    samples: 8
  gates:
  - {name: close, maxPerplexityIncreasePercent: "2.0"}
  - {name: closer, output: int4, maxPerplexityIncreasePercent: "1"}
  compute: {accelerator: {perNode: 1}}
  storage: {s3: {credentialsSecret: {name: s3}}}
  workspace: {uri: "s3://runs/team"}
"""


def job(text: str, *, uid: str = UID, **spec: Any) -> Job:
    """Parse a manifest as the operator reads it from the API server; keyword arguments replace blocks of its spec."""
    manifest = yaml.safe_load(text)
    manifest["metadata"]["uid"] = uid
    manifest["spec"] |= spec
    return parse_job(manifest)


def finetunejob(text: str, *, uid: str = UID, **spec: Any) -> FineTuneJob:
    """The same, of a FineTuneJob."""
    parsed = job(text, uid=uid, **spec)
    assert isinstance(parsed, FineTuneJob)
    return parsed
