"""FineTuneJobs to render: one as small as can be, one that uses everything."""

from typing import Any

import yaml

from kubetune_operator.api.finetunejob import FineTuneJob, parse_finetunejob

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
  lora: {rank: 8, alpha: 16, dropout: "0.1", targetModules: [q_proj, v_proj]}
  training:
    maxSteps: 100
    globalBatchSize: 64
    microBatchSize: 2
    learningRate: "2e-4"
    weightDecay: "1e-5"
    validateEverySteps: 20
    activationCheckpointing: Full
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
  lifecycle: {maxRestarts: 5, gracePeriodSeconds: 60}
"""


def finetunejob(text: str, *, uid: str = UID, **spec: Any) -> FineTuneJob:
    """Parse a manifest as the operator reads it from the API server; keyword arguments replace blocks of its spec."""
    manifest = yaml.safe_load(text)
    manifest["metadata"]["uid"] = uid
    manifest["spec"] |= spec
    return parse_finetunejob(manifest)
