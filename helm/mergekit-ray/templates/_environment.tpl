{{/* Environment variables: for all containers, for those in a Ray cluster, and for those that read and write models. */}}
{{- define "mergekit-ray.environment" -}}
{{- $values := .root.Values -}}
- name: HOME
  value: /tmp
{{- if .ray }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- with .auth }}
- name: RAY_AUTH_MODE
  value: {{ . }}
{{- end }}
{{- end }}
{{- if .stores }}
{{- with $values.s3 }}
{{- if .endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ .endpoint | quote }}
{{- end }}
{{- if .region }}
- name: AWS_REGION
  value: {{ .region | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .region | quote }}
{{- end }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  {{- include "mergekit-ray.fromSecret" (list .existingSecret .accessKeyIdKey) | nindent 2 }}
- name: AWS_SECRET_ACCESS_KEY
  {{- include "mergekit-ray.fromSecret" (list .existingSecret .secretAccessKeyKey) | nindent 2 }}
{{- if .sessionTokenKey }}
- name: AWS_SESSION_TOKEN
  {{- include "mergekit-ray.fromSecret" (list .existingSecret .sessionTokenKey) | nindent 2 }}
{{- end }}
{{- end }}
{{- if .caConfigMap }}
- name: AWS_CA_BUNDLE
  value: /etc/mergekit-ray/ca/ca.crt
{{- end }}
{{- end }}
{{- with $values.hub }}
{{- if .existingSecret }}
- name: HF_TOKEN
  {{- include "mergekit-ray.fromSecret" (list .existingSecret .key) | nindent 2 }}
{{- end }}
{{- if .endpoint }}
- name: HF_ENDPOINT
  value: {{ .endpoint | quote }}
{{- end }}
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mergekit-ray.fromSecret" -}}
valueFrom:
  secretKeyRef:
    name: {{ index . 0 }}
    key: {{ index . 1 }}
{{- end }}
