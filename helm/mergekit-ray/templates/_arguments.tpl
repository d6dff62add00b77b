{{/*
The command of a run. On Ray, two shells read it; values.schema.json therefore refuses characters that a shell interprets.
*/}}
{{- define "mergekit-ray.arguments" -}}
{{- $merge := .root.Values.merge }}
{{- $words := list "merge" .recipe }}
{{- with .root.Values.output }}{{ $words = append $words . }}{{ end }}
{{- $words = concat $words (list "--executor" .executor "--log-format" $merge.logFormat) }}
{{- $workers := include "mergekit-ray.workers" .root }}
{{- if $workers }}{{ $words = concat $words (list "--workers" $workers) }}{{ end }}
{{- with $merge.memory }}{{ $words = concat $words (list "--memory" (nospace .)) }}{{ end }}
{{- if not (kindIs "invalid" $merge.seed) }}{{ $words = concat $words (list "--seed" (printf "%d" (int64 $merge.seed))) }}{{ end }}
{{- if ne $merge.device "auto" }}{{ $words = concat $words (list "--device" $merge.device) }}{{ end }}
{{- if $merge.overwrite }}{{ $words = append $words "--overwrite" }}{{ end }}
{{- if $merge.allowNonFinite }}{{ $words = append $words "--allow-non-finite" }}{{ end }}
{{- if $merge.allowConfigConflicts }}{{ $words = append $words "--allow-config-conflicts" }}{{ end }}
{{- if $merge.unsafeIgnoreTokenizers }}{{ $words = append $words "--unsafe-ignore-tokenizers" }}{{ end }}
{{- if $merge.lenient }}{{ $words = append $words "--lenient" }}{{ end }}
{{- concat $words $merge.extraArgs | toYaml }}
{{- end }}

{{/* Ray's autoscaler adds pods for workers that wait, so a merge that uses it must ask for a number of workers. */}}
{{- define "mergekit-ray.workers" -}}
{{- if not (kindIs "invalid" .Values.merge.workers) }}
{{- int .Values.merge.workers }}
{{- else if and (eq .Values.mode "rayjob") .Values.autoscaling.enabled }}
{{- $total := 0 }}
{{- range $name := keys .Values.workerGroups }}
{{- $group := include "mergekit-ray.workerGroup" (dict "root" $ "name" $name) | fromYaml }}
{{- $total = add $total (int $group.maxReplicas) }}
{{- end }}
{{- $total }}
{{- end }}
{{- end }}
