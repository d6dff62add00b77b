{{/*
A pod of one container.

  root         the chart's context
  component    label of its role
  settings     resources, nodeSelector, tolerations, affinity, ... of the role
  name         of the container
  args         its command, run by the image's entrypoint (tini); empty where KubeRay sets it
  ports        of the container, if any
  recipe       whether the recipe is mounted at /etc/mergekit-ray/recipe.yml
  scripts      whether the chart's scripts are mounted at /etc/mergekit-ray/scripts
  ray          whether it belongs to a Ray cluster, or connects to one
  auth         RAY_AUTH_MODE, if ray
  node         whether it is a node of one, with an object store
  stores       whether it reads and writes models: credentials, extra environment and volumes
  api          whether it gets a token of the Kubernetes API
  env          more environment variables
*/}}
{{- define "mergekit-ray.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "mergekit-ray.podLabels" . | nindent 4 }}
  {{- with merge (dict) (default dict .settings.annotations) $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "mergekit-ray.podSpec" . | nindent 2 }}
{{- end }}

{{- define "mergekit-ray.podSpec" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ include "mergekit-ray.serviceAccountName" .root }}
automountServiceAccountToken: {{ .api | default false }}
enableServiceLinks: false
{{- if .restartPolicy }}
restartPolicy: {{ .restartPolicy }}
{{- end }}
terminationGracePeriodSeconds: {{ int (default 60 .settings.terminationGracePeriodSeconds) }}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "mergekit-ray.podSecurity" .root | nindent 2 }}
{{- with merge (dict) (default dict .settings.nodeSelector) (.settings.spot | default false | ternary $values.spot.nodeSelector dict) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "mergekit-ray.tolerations" . | fromYamlArray }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ int (default 1 .maxSkew) }}
    whenUnsatisfiable: {{ default "ScheduleAnyway" .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "mergekit-ray.selectorLabels" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
        {{- with $.group }}
        ray.io/group: {{ . }}
        {{- end }}
  {{- end }}
{{- end }}
containers:
  - {{ include "mergekit-ray.container" . | indent 4 | trim }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: {{ $values.temporaryStorage.sizeLimit }}
  {{- if .node }}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ $values.sharedMemory.sizeLimit }}
  {{- end }}
  {{- if .recipe }}
  - name: recipe
    configMap:
      name: {{ include "mergekit-ray.recipeConfigMapName" .root }}
      items:
        - key: {{ empty $values.recipe.existingConfigMap | ternary "recipe.yml" $values.recipe.key }}
          path: recipe.yml
  {{- end }}
  {{- if .scripts }}
  - name: scripts
    configMap:
      name: {{ include "mergekit-ray.scriptsConfigMapName" .root }}
  {{- end }}
  {{- if .stores }}
  {{- with $values.s3.caConfigMap }}
  - name: ca
    configMap:
      name: {{ . }}
      items:
        - key: {{ $values.s3.caKey }}
          path: ca.crt
  {{- end }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end }}

{{- define "mergekit-ray.container" -}}
{{- $values := .root.Values -}}
name: {{ .name }}
image: {{ include "mergekit-ray.image" (dict "root" .root "tag" .settings.imageTag) | quote }}
imagePullPolicy: {{ $values.image.pullPolicy }}
{{- with .args }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
env:
  {{- include "mergekit-ray.environment" . | nindent 2 }}
  {{- with .env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if .stores }}
{{- with $values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .ports }}
ports:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- include "mergekit-ray.resources" .settings | nindent 2 }}
securityContext:
  {{- include "mergekit-ray.containerSecurity" .root | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- if .node }}
  - name: shared-memory
    mountPath: /dev/shm
  {{- end }}
  {{- if .recipe }}
  - name: recipe
    mountPath: /etc/mergekit-ray/recipe.yml
    subPath: recipe.yml
    readOnly: true
  {{- end }}
  {{- if .scripts }}
  - name: scripts
    mountPath: /etc/mergekit-ray/scripts
    readOnly: true
  {{- end }}
  {{- if .stores }}
  {{- if $values.s3.caConfigMap }}
  - name: ca
    mountPath: /etc/mergekit-ray/ca
    readOnly: true
  {{- end }}
  {{- with $values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* A role's tolerations, plus those for GPU nodes and spot nodes. */}}
{{- define "mergekit-ray.tolerations" -}}
{{- $all := default list .settings.tolerations }}
{{- $keys := list }}
{{- range $all }}{{ $keys = append $keys (default "" .key) }}{{ end }}
{{- if and .settings.gpus (not (has .settings.gpuResource $keys)) }}
{{- $all = append $all (dict "key" .settings.gpuResource "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- if .settings.spot }}{{ $all = concat $all .root.Values.spot.tolerations }}{{ end }}
{{- toYaml $all }}
{{- end }}

{{/* A role's resources, with its GPUs as a limit, as Kubernetes wants it. */}}
{{- define "mergekit-ray.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if .gpus }}
{{- $limits := default dict $resources.limits }}
{{- $_ := set $limits .gpuResource (printf "%d" (int .gpus)) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* The restricted Pod Security Standard. Only the IDs can be changed, for clusters that choose them. */}}
{{- define "mergekit-ray.podSecurity" -}}
{{- $security := .Values.security -}}
runAsNonRoot: true
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- $id := get $security $key }}
{{- if $id }}
{{ $key }}: {{ int64 $id }}
{{- end }}
{{- end }}
{{- if $security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "mergekit-ray.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}
