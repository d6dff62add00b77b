{{/*
Every name and label of the chart.

KubeRay appends to a RayJob's name for the cluster and its services, and takes at most 47 characters. Using 38 of the
release's and the chart's names leaves room for a hash.
*/}}

{{- define "mergekit-ray.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 38 | trimSuffix "-" }}
{{- end }}

{{- define "mergekit-ray.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := .Values.fullnameOverride }}
{{- if not $full }}
{{- $full = contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- end }}
{{- /* KubeRay makes a service of the name, and such names begin with a letter. */}}
{{- if not (regexMatch "^[a-z]" $full) }}
{{- $full = printf "m-%s" $full }}
{{- end }}
{{- $full | replace "." "-" | trunc 38 | trimSuffix "-" }}
{{- end }}

{{- define "mergekit-ray.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "mergekit-ray.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Named by its content, so that pods of the previous run keep their recipe while they stop. */}}
{{- define "mergekit-ray.recipeConfigMapName" -}}
{{- if .Values.recipe.existingConfigMap }}
{{- .Values.recipe.existingConfigMap }}
{{- else }}
{{- printf "%s-recipe-%s" (include "mergekit-ray.fullname" .) (.Values.recipe.content | sha256sum | trunc 8) }}
{{- end }}
{{- end }}

{{- define "mergekit-ray.scriptsConfigMapName" -}}
{{- $content := printf "%s%s" (.Files.Get "files/submit.py") (.Files.Get "files/tiny_merge.py") }}
{{- printf "%s-scripts-%s" (include "mergekit-ray.fullname" .) ($content | sha256sum | trunc 8) }}
{{- end }}

{{/* Named by what it runs: RayJobs and Jobs cannot be changed, so another run needs another name. */}}
{{- define "mergekit-ray.jobName" -}}
{{- $spec := "" }}
{{- if eq .Values.mode "rayjob" }}
{{- $spec = include "mergekit-ray.rayJobSpec" . }}
{{- else if eq .Values.mode "existing-cluster" }}
{{- $spec = include "mergekit-ray.submitterJobSpec" . }}
{{- else }}
{{- $spec = include "mergekit-ray.localJobSpec" . }}
{{- end }}
{{- printf "%s-%s" (include "mergekit-ray.fullname" .) (printf "%s\n%s" .Values.run $spec | sha256sum | trunc 8) }}
{{- end }}

{{/* A role's own tag takes precedence over the digest, which belongs to another image. */}}
{{- define "mergekit-ray.image" -}}
{{- $image := .root.Values.image }}
{{- if and $image.digest (not .tag) }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (coalesce .tag $image.tag .root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- define "mergekit-ray.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mergekit-ray.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mergekit-ray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "mergekit-ray.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: mergekit-ray
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Without the chart's version, so that a new chart that makes the same pods starts no new run. */}}
{{- define "mergekit-ray.podLabels" -}}
{{ include "mergekit-ray.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: mergekit-ray
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .root.Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}
