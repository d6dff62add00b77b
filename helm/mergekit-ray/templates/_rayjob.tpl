{{/* One worker group: its own settings over the defaults. */}}
{{- define "mergekit-ray.workerGroup" -}}
{{- mergeOverwrite (deepCopy .root.Values.workerDefaults) (deepCopy (default dict (get .root.Values.workerGroups .name))) | toYaml }}
{{- end }}

{{- define "mergekit-ray.replicas" -}}
{{- kindIs "invalid" .replicas | ternary .minReplicas .replicas | int }}
{{- end }}

{{- define "mergekit-ray.rayJobSpec" -}}
{{- $values := .Values -}}
submissionMode: K8sJobMode
entrypoint: {{ include "mergekit-ray.arguments" (dict "root" . "recipe" "/etc/mergekit-ray/recipe.yml" "executor" "ray") | fromYamlArray | join " " | quote }}
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ int $values.job.clusterTtlSeconds }}
{{- /* Each retry gets a new cluster and, without a jobId, a new submission. */}}
backoffLimit: {{ int $values.job.retries }}
{{- if not (kindIs "invalid" $values.job.deadlineSeconds) }}
activeDeadlineSeconds: {{ int $values.job.deadlineSeconds }}
{{- end }}
{{- if not (kindIs "invalid" $values.job.startDeadlineSeconds) }}
preRunningDeadlineSeconds: {{ int $values.job.startDeadlineSeconds }}
{{- end }}
{{- if $values.job.suspend }}
suspend: true
{{- end }}
submitterConfig:
  backoffLimit: {{ int $values.submitter.retries }}
submitterPodTemplate:
  {{- include "mergekit-ray.pod" (dict "root" . "component" "submitter" "settings" $values.submitter "name" "submitter" "ray" true "auth" $values.ray.auth "restartPolicy" "Never") | nindent 2 }}
rayClusterSpec:
  rayVersion: {{ $values.ray.version | quote }}
  authOptions:
    mode: {{ $values.ray.auth }}
  {{- if $values.autoscaling.enabled }}
  enableInTreeAutoscaling: true
  autoscalerOptions:
    {{- include "mergekit-ray.autoscalerOptions" . | nindent 4 }}
  {{- end }}
  headGroupSpec:
    rayStartParams:
      {{- $chosen := dict "num-cpus" "0" "dashboard-host" "0.0.0.0" }}
      {{- include "mergekit-ray.rayStartParams" (dict "root" . "chosen" $chosen "settings" $values.head) | nindent 6 }}
    template:
      {{- $ports := list (dict "name" "gcs" "containerPort" 6379) (dict "name" "dashboard" "containerPort" 8265) (dict "name" "client" "containerPort" 10001) (dict "name" "metrics" "containerPort" 8080) }}
      {{- /* Seconds a merge has to abandon its shards once its job is stopped. Ray's default is 3. */}}
      {{- $env := list (dict "name" "RAY_JOB_STOP_WAIT_TIME_S" "value" "30") }}
      {{- include "mergekit-ray.pod" (dict "root" . "component" "head" "settings" $values.head "name" "ray-head" "ports" $ports "env" $env "recipe" true "ray" true "auth" $values.ray.auth "node" true "stores" true "api" $values.autoscaling.enabled) | nindent 6 }}
  workerGroupSpecs:
    {{- range $name := keys $values.workerGroups | sortAlpha }}
    {{- $group := include "mergekit-ray.workerGroup" (dict "root" $ "name" $name) | fromYaml }}
    - groupName: {{ $name }}
      replicas: {{ include "mergekit-ray.replicas" $group }}
      minReplicas: {{ int $group.minReplicas }}
      maxReplicas: {{ int $group.maxReplicas }}
      rayStartParams:
        {{- $chosen := dict }}
        {{- with include "mergekit-ray.workMemory" (dict "resources" $group.resources "reserved" $values.ray.reservedMemory "name" $name) }}
        {{- $_ := set $chosen "memory" . }}
        {{- end }}
        {{- include "mergekit-ray.rayStartParams" (dict "root" $ "chosen" $chosen "settings" $group) | nindent 8 }}
      template:
        {{- $ports := list (dict "name" "metrics" "containerPort" 8080) }}
        {{- include "mergekit-ray.pod" (dict "root" $ "component" "worker" "group" $name "settings" $group "name" "ray-worker" "ports" $ports "ray" true "auth" $values.ray.auth "node" true "stores" true) | nindent 8 }}
    {{- end }}
{{- end }}

{{- define "mergekit-ray.rayStartParams" -}}
{{- $common := dict "metrics-export-port" "8080" "object-store-memory" (include "mergekit-ray.bytes" .root.Values.ray.objectStoreMemory) }}
{{- merge (dict) .settings.rayStartParams .chosen $common | toYaml }}
{{- end }}

{{- define "mergekit-ray.autoscalerOptions" -}}
{{- with .Values.autoscaling -}}
version: v2
idleTimeoutSeconds: {{ int .idleTimeoutSeconds }}
upscalingMode: {{ .upscalingMode }}
resources:
  {{- toYaml .resources | nindent 2 }}
{{- end }}
env:
  {{- /* KubeRay sets the mode itself if it gives this container a token. */}}
  {{- $auth := eq .Values.ray.auth "disabled" | ternary "disabled" "" }}
  {{- include "mergekit-ray.environment" (dict "root" . "ray" true "auth" $auth) | nindent 2 }}
securityContext:
  {{- include "mergekit-ray.containerSecurity" . | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end }}
