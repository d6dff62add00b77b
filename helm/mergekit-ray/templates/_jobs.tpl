{{/*
Jobs of Kubernetes' own. A request or inputs that are wrong (exit codes 2 and 3) are not tried again, pods that had to
make way for others do not count, and each new pod makes a new submission.
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
Not a RayJob with a clusterSelector: KubeRay cannot retry one. Until 1.5 it deleted the selected cluster to do so, newer
versions refuse a backoffLimit.
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
