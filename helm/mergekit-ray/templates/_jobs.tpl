{{/*
Kubernetes' own Jobs. They do not retry a wrong request or wrong inputs (exit codes 2 and 3) and do not count evicted pods.
Each new pod submits anew.
*/}}
{{- define "mergekit-ray.jobSpec" -}}
{{- $job := .root.Values.job -}}
backoffLimit: {{ int $job.retries }}
{{- if not (kindIs "invalid" $job.deadlineSeconds) }}
activeDeadlineSeconds: {{ int $job.deadlineSeconds }}
{{- end }}
ttlSecondsAfterFinished: {{ int $job.ttlSecondsAfterFinished }}
{{- if $job.suspend }}
suspend: true
{{- end }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        containerName: {{ .name }}
        operator: In
        values: [2, 3]
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  {{- include "mergekit-ray.pod" . | nindent 2 }}
{{- end }}

{{- define "mergekit-ray.localJobSpec" -}}
{{- $command := include "mergekit-ray.arguments" (dict "root" . "recipe" "/etc/mergekit-ray/recipe.yml" "executor" "local") | fromYamlArray }}
{{- include "mergekit-ray.jobSpec" (dict "root" . "component" "merge" "settings" .Values.local "name" "merge" "args" $command "recipe" true "stores" true "restartPolicy" "Never") }}
{{- end }}

{{- define "mergekit-ray.dashboardAddress" -}}
{{- with .Values.existingCluster }}
{{- default (printf "http://%s-head-svc:8265" .name) .address }}
{{- end }}
{{- end }}

{{/*
A RayJob with a clusterSelector would not do, as KubeRay cannot retry it: up to version 1.5 it deletes the selected cluster,
and newer versions refuse a backoffLimit.
*/}}
{{- define "mergekit-ray.submitterJobSpec" -}}
{{- $cluster := .Values.existingCluster }}
{{- $merge := include "mergekit-ray.arguments" (dict "root" . "recipe" "recipe.yml" "executor" "ray") | fromYamlArray }}
{{- $script := list "python3" "/etc/mergekit-ray/scripts/submit.py" "/etc/mergekit-ray/recipe.yml" "--" }}
{{- $env := list (dict "name" "RAY_DASHBOARD_ADDRESS" "value" (include "mergekit-ray.dashboardAddress" .)) }}
{{- $env = append $env (dict "name" "MERGE_RUN" "valueFrom" (dict "fieldRef" (dict "fieldPath" "metadata.labels['job-name']"))) }}
{{- with $cluster.auth.existingSecret }}
{{- $env = append $env (dict "name" "RAY_AUTH_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $cluster.auth.key))) }}
{{- end }}
{{- $auth := empty $cluster.auth.existingSecret | ternary "disabled" "token" }}
{{- include "mergekit-ray.jobSpec" (dict "root" . "component" "submitter" "settings" .Values.submitter "name" "submitter" "args" (concat $script $merge) "recipe" true "scripts" true "ray" true "auth" $auth "env" $env "restartPolicy" "Never") }}
{{- end }}
