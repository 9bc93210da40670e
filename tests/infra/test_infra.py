"""infra/, checked without Docker, Kubernetes or a cloud.

Ray, MLflow and botocore themselves read what is for them, kubernetes-validate what is for Kubernetes. For Compose and
for KubeRay's operator there is no package: this file has the names from their documentation.
"""

import configparser
import copy
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import sqlalchemy
import yaml
from ray._private.runtime_env.packaging import _dir_travel
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
KUBERNETES = "1.37"
RAY_UP = ("ray-aws.yaml", "ray-gcp.yaml")
MANIFESTS = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/network.yaml", "mlflow/kubernetes.yaml")
PLACEHOLDERS = ("REGISTRY", "AMI_ID", "PROJECT", "IMAGE_FAMILY")
"""What differs from place to place, to be replaced by the user: none is a name that anything would accept."""

COMPOSE = {
    "": "name services networks volumes secrets configs",
    "services.*": "build cap_drop command configs depends_on deploy environment healthcheck image init networks "
    "ports pull_policy restart secrets security_opt shm_size volumes",
    "services.*.build": "context dockerfile args",
    "services.*.depends_on.*": "condition",
    "services.*.deploy": "replicas resources",
    "services.*.deploy.resources": "limits reservations",
    "services.*.deploy.resources.limits": "cpus memory",
    "services.*.healthcheck": "test interval timeout retries start_period",
    "services.*.secrets.[]": "source target",
    "services.*.configs.[]": "source target",
    "networks.*": "internal",
    "volumes.*": "",
    "secrets.*": "file",
    "configs.*": "file",
}
"""Field names of the Compose Specification (05-services.md, build.md, deploy.md, 06 to 09), by path."""
KUBERAY = {
    "RayJob": "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished "
    "submitterPodTemplate rayClusterSpec",
    "RayCluster": "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    "authOptions": "mode secretName",
    "autoscalerOptions": "version idleTimeoutSeconds securityContext resources",
    "headGroupSpec": "rayStartParams template",
    "workerGroupSpecs": "groupName replicas minReplicas maxReplicas rayStartParams template",
}
"""Fields of KubeRay's custom resources (its CRD API reference, ray.io/v1, KubeRay 1.6 and 1.7)."""
IN_THE_IMAGE = {
    "boto3": "the head of ray-aws.yaml starts nodes by it, and MLflow's server stores artifacts",
    "Flask-WTF": "mlflow server --app-name basic-auth",
    "google-api-python-client": "the head of ray-gcp.yaml",
    "google-auth-httplib2": "the head of ray-gcp.yaml",
    "psycopg2-binary": "MLflow's server and PostgreSQL",
}
"""Distributions that services of infra/ import, and the pipeline on a laptop does not."""


def read(name: str) -> str:
    return (INFRA / name).read_text(encoding="utf-8")


@cache
def _documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(read(name)))


def documents(name: str) -> list[Any]:
    return copy.deepcopy(_documents(name))


def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]


def texts() -> list[tuple[str, str]]:
    """All files under infra/ but the secrets that a user has made there."""
    paths = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    names = [str(path.relative_to(INFRA)) for path in paths]
    return [(name, read(name)) for name in names if not name.startswith("secrets/") and ".local." not in name]


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def pins(requirements: list[str]) -> dict[str, str]:
    found = [re.fullmatch(r"([\w.-]+)(?:\[.*\])?==([\w.]+)", line.partition(";")[0].strip()) for line in requirements]
    return {normal(match[1]): match[2] for match in found if match}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def pinned(distribution: str) -> str:
    return pins(project()["project"]["dependencies"])[distribution]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, each on one line."""
    lines = [line for line in read("Dockerfile").splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined)]


def arguments(instruction: str) -> list[str]:
    return [argument for word, argument in instructions() if word == instruction]


def walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a document, with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from walk(item, (*path, "[]"))


def pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """All templates of pods: those of Deployments and StatefulSets, and those inside KubeRay's resources."""
    keys = {"template", "submitterPodTemplate"}
    return [
        (f"{name}:{document['kind']}.{'.'.join(path)}", value)
        for name in MANIFESTS
        for document in documents(name)
        for path, value in walk(document["spec"])
        if path and path[-1] in keys and isinstance(value, dict)
    ]


def images() -> list[str]:
    """Every image that is run, in all files."""
    found = [service["image"] for service in compose()["services"].values()]
    found += [documents(name)[0]["docker"]["image"] for name in RAY_UP]
    return found + [c["image"] for _, template in pod_templates() for c in template["spec"]["containers"]]


def test_dockerfile_has_the_python_that_the_project_asks_for():
    assert arguments("FROM") == ["python:${PYTHON}-slim-bookworm"]
    assert (
        f">={dict(line.split('=') for line in arguments('ARG') if '=' in line)['PYTHON']}"
        == (project()["project"]["requires-python"])
    )


def test_dockerfile_installs_by_the_constraints_alone():
    installations = [part for run in arguments("RUN") for part in re.split(r"&&|;;", run) if "pip install" in part]
    assert installations
    for part in installations:
        assert part.count("pip install") == 1
        assert "--constraint constraints.txt" in part
        assert re.search(r"(torch|--editable '\.\[cluster\]') *$", part), part


def test_constraints_have_the_versions_of_the_project():
    constraints = pins((REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines())
    project_pins = pins(project()["project"]["dependencies"])
    assert {name: constraints.get(name) for name in project_pins} == project_pins


def test_cluster_extra_has_what_services_need():
    extra = pins(project()["project"]["optional-dependencies"]["cluster"])
    assert {normal(name) for name in IN_THE_IMAGE} <= set(extra) | set(pins(project()["project"]["dependencies"]))


def torch_installation(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the Dockerfile's own lines that install torch, with a pip that only says what it was asked."""
    (script,) = (run for run in arguments("RUN") if "DEVICE" in run)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_dockerfile_for_cuda_installs_torch_plainly(tmp_path):
    done = torch_installation(tmp_path, DEVICE="cuda", TORCH_INDEX="")
    assert done.stdout.split() == ["install", "--no-cache-dir", "--constraint", "constraints.txt", "torch"]


def test_dockerfile_for_cpu_takes_torch_alone_from_the_index(tmp_path):
    words = torch_installation(tmp_path, DEVICE="cpu", TORCH_INDEX="https://example.org/cpu").stdout.split()
    assert words[words.index("--index-url") + 1] == "https://example.org/cpu"
    assert "--no-deps" in words


@pytest.mark.parametrize(("device", "message"), [("cpu", "needs TORCH_INDEX"), ("tpu", "cpu or cuda, got tpu")])
def test_dockerfile_refuses_an_impossible_build(tmp_path, device, message):
    done = torch_installation(tmp_path, DEVICE=device, TORCH_INDEX="")
    assert done.returncode
    assert message in done.stderr


def test_dockerfile_ends_as_a_user_that_is_not_root():
    user = int(arguments("USER")[-1].partition(":")[0])
    assert user > 0
    assert instructions()[-1][0] == "USER", "what follows USER would write files as that user, or change it back"


def test_dockerfile_turns_telemetry_off_and_names_the_home():
    environment = dict(pair.split("=") for argument in arguments("ENV") for pair in argument.split())
    assert environment.items() >= {
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("DVC_NO_ANALYTICS", "1"),
        ("HOME", "/home/ray"),
    }


def test_dockerfile_copies_the_project_and_nothing_else():
    copied = {word for argument in arguments("COPY") for word in argument.split()[:-1] if not word.startswith("--")}
    lines = [line for line in read("Dockerfile.dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    packages = {name.rstrip("*") for name in project()["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert copied >= packages | {"conf", "params.yaml", "constraints.txt"}
    assert all((REPOSITORY / name).exists() for name in copied)
    assert not arguments("ADD")


def test_images_of_the_project_have_its_version():
    version = project()["project"]["version"]
    own = [image for image in images() if "attention-pipeline" in image]
    assert own
    for image in own:
        assert re.fullmatch(rf"(REGISTRY/)?attention-pipeline:{re.escape(version)}-(cpu|cuda)", image)


def test_images_have_tags_with_a_version():
    for image in images():
        name, _, tag = image.rpartition(":")
        assert name
        assert re.search(r"\d+\.\d+", tag), image


def test_nodes_pull_an_image_that_was_pushed_again_with_its_tag():
    containers = [container for _, template in pod_templates() for container in template["spec"]["containers"]]
    policies = {c["name"]: c.get("imagePullPolicy") for c in containers if "attention-pipeline" in c["image"]}
    assert set(policies) == {"ray-head", "ray-worker", "submitter", "mlflow"}
    assert set(policies.values()) == {"Always"}
    assert all(documents(name)[0]["docker"]["pull_before_run"] for name in RAY_UP)


def test_images_of_the_databases_are_the_same():
    assert len({image for image in images() if "postgres" in image}) == 1


def test_kuberay_has_the_version_of_ray():
    specs = [
        documents("kuberay/raycluster.yaml")[0]["spec"],
        documents("kuberay/rayjob.yaml")[0]["spec"]["rayClusterSpec"],
    ]
    assert [spec["rayVersion"] for spec in specs] == [pinned("ray")] * 2


def test_readme_names_the_version_of_the_images():
    assert set(re.findall(r"attention-pipeline:([\d.]+)-", read("README.md"))) == {project()["project"]["version"]}


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts(name):
    validate_config(prepare_config(documents(name)[0]))


@pytest.mark.parametrize("name", RAY_UP)
@pytest.mark.parametrize("path", [(), ("docker",), ("auth",), ("available_node_types", "gpu")])
def test_ray_up_refuses_a_misspelt_key(name, path):
    config = documents(name)[0]
    place = config
    for key in path:
        place = place[key]
    place["mispelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="mispelt"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("node_type", ["head", "gpu"])
def test_ray_up_nodes_are_accepted_by_aws(node_type):
    session = pytest.importorskip("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    node = documents("ray-aws.yaml")[0]["available_node_types"][node_type]["node_config"]
    from botocore.validate import ParamValidator

    assert ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape).generate_report() == ""


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_installs_nothing_on_a_node(name):
    config = prepare_config(documents(name)[0])
    commands = [value for path, value in walk(config) if path[-2:-1] and path[-2].endswith("commands")]
    assert commands
    assert not [command for command in commands if re.search(r"\b(pip|conda|apt|apt-get|curl|wget)\b", command)]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_head_has_no_work_and_workers_are_spot(name):
    config = documents(name)[0]
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    market = {"aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType")}
    market["gcp"] = lambda node: node.get("scheduling", {}).get("provisioningModel")
    spot = {key: market[config["provider"]["type"]](node["node_config"]) for key, node in types.items()}
    assert spot["head"] is None
    assert spot["gpu"].lower() == "spot"
    assert 1 <= types["gpu"]["min_workers"] <= types["gpu"]["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_job_api_asks_for_the_token_on_the_heads_loopback(name):
    config = documents(name)[0]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def unknown_fields(document: dict[str, Any]) -> list[str]:
    """Paths of fields that the table COMPOSE does not have, extensions (x-...) aside."""
    rules = {tuple(rule.split(".")) if rule else (): names.split() for rule, names in COMPOSE.items()}
    return [
        ".".join((*path, key))
        for path, value in walk(document)
        if isinstance(value, dict) and not (path and path[0].startswith("x-"))
        for rule, names in rules.items()
        if len(rule) == len(path) and all(part in ("*", here) for part, here in zip(rule, path, strict=True))
        for key in value
        if key not in names and not key.startswith("x-")
    ]


def test_compose_has_no_unknown_field():
    assert unknown_fields(compose()) == []


@pytest.mark.parametrize(
    "path", [(), ("services", "mlflow"), ("services", "s3", "healthcheck"), ("secrets", "ray_token")]
)
def test_unknown_fields_finds_a_misspelt_field_of_compose(path):
    document = compose()
    place = document
    for key in path:
        place = place[key]
    place["mispelt"] = None
    assert unknown_fields(document) == [".".join((*path, "mispelt"))]


def names_in(entries: list[Any]) -> set[str]:
    return {entry["source"] if isinstance(entry, dict) else entry for entry in entries}


@pytest.mark.parametrize("kind", ["secrets", "configs", "networks"])
def test_compose_services_use_what_is_declared(kind):
    used = set().union(*(names_in(service.get(kind, [])) for service in compose()["services"].values()))
    assert used == set(compose()[kind])


def test_compose_services_wait_for_services_with_a_health_check():
    services = compose()["services"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert services[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", compose()["services"])
def test_compose_service_is_restarted_watched_and_without_rights(name):
    service = compose()["services"][name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["networks"]


def test_compose_publishes_ports_on_the_hosts_loopback_alone():
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []
    assert compose()["networks"]["database"] == {"internal": True}
    assert compose()["services"]["postgres"]["networks"] == ["database"]


def test_compose_nodes_ask_for_the_token_and_have_shared_memory():
    for name in ("ray-head", "ray-worker"):
        service = compose()["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["shm_size"]


def test_compose_makes_the_bucket_that_it_uses():
    services = compose()["services"]
    (bucket,) = (word.partition("=")[2] for word in services["s3"]["command"] if word.startswith("-bucket="))
    assert services["ray-head"]["environment"]["RUN_STORAGE"].startswith(f"s3://{bucket}/")
    assert f"--artifacts-destination s3://{bucket}/" in services["mlflow"]["command"][-1]
    assert "-master.telemetry=false" in services["s3"]["command"]


def test_make_secrets_makes_every_secret_once(tmp_path):
    def make() -> dict[str, str]:
        subprocess.run([INFRA / "make-secrets.sh", tmp_path / "secrets"], check=True)
        return {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}

    made = make()
    assert {Path(secret["file"]).name for secret in compose()["secrets"].values()} <= set(made)
    assert all(Path(secret["file"]).parent == Path("secrets") for secret in compose()["secrets"].values())
    assert len(set(made.values())) == len(made)
    assert all(len(made[name]) == 48 for name in ("ray_token", "postgres_password", "mlflow_admin_password"))
    (identity,) = json.loads(made["s3.json"])["identities"]
    assert identity["credentials"] == [{"accessKey": made["s3_key"], "secretKey": made["s3_secret"]}]
    clients = {name: configparser.ConfigParser() for name in ("aws_credentials", "mlflow_credentials")}
    for name, parser in clients.items():
        parser.read_string(made[name])
    assert clients["aws_credentials"]["default"]["aws_secret_access_key"] == made["s3_secret"]
    assert clients["mlflow_credentials"]["mlflow"]["mlflow_tracking_password"] == made["mlflow_admin_password"]
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    assert make() == made


def template_of(pod: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}


@pytest.mark.parametrize("name", [name for name in MANIFESTS if "/ray" not in name])
def test_kubernetes_accepts(name):
    for document in documents(name):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("where", "template"), pod_templates(), ids=[where for where, _ in pod_templates()])
def test_kubernetes_accepts_the_pods(where, template):
    kubernetes_validate.validate(template_of(template), KUBERNETES, strict=True)
    template["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="enviroment"):
        kubernetes_validate.validate(template_of(template), KUBERNETES, strict=True)


def unknown_kuberay_fields(spec: dict[str, Any], kind: str) -> list[str]:
    found = [f"{kind}.{key}" for key in spec if key not in KUBERAY[kind].split()]
    for key, value in spec.items():
        if key in ("rayClusterSpec", *KUBERAY):
            inner = "RayCluster" if key == "rayClusterSpec" else key
            for item in value if isinstance(value, list) else [value]:
                found += unknown_kuberay_fields(item, inner)
    return found


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_kuberay_has_no_unknown_field(name):
    (document,) = documents(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert unknown_kuberay_fields(document["spec"], document["kind"]) == []


@pytest.mark.parametrize("key", ["authOptions", "autoscalerOptions", "headGroupSpec"])
def test_unknown_kuberay_fields_finds_a_misspelt_field(key):
    (document,) = documents("kuberay/rayjob.yaml")
    document["spec"]["rayClusterSpec"][key]["mispelt"] = 1
    assert unknown_kuberay_fields(document["spec"], "RayJob") == [f"{key}.mispelt"]


def test_kuberay_job_has_the_standing_cluster():
    (cluster,), (job,) = documents("kuberay/raycluster.yaml"), documents("kuberay/rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_kuberay_cluster_asks_for_the_token():
    (cluster,) = documents("kuberay/raycluster.yaml")
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def ray_node_types(cluster: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler reads from a RayCluster."""
    cluster["metadata"]["namespace"] = "attention"  # KubeRay puts it there
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def test_kuberay_cluster_is_a_head_without_work_and_gpu_workers_to_ray():
    (cluster,) = documents("kuberay/raycluster.yaml")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    types = ray_node_types(cluster)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert 1 <= types["gpu"]["min_workers"] <= group["replicas"] <= types["gpu"]["max_workers"]


@pytest.mark.parametrize("key", ["groupName", "minReplicas", "maxReplicas", "template"])
def test_kuberay_worker_group_with_a_misspelt_field_is_refused_by_ray(key):
    (cluster,) = documents("kuberay/raycluster.yaml")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    group["mispelt"] = group.pop(key)
    with pytest.raises(KeyError, match=key):
        ray_node_types(cluster)


def test_kuberay_job_runs_a_module_that_exists():
    (job,) = documents("kuberay/rayjob.yaml")
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    assert (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file()


def test_commands_of_infra_name_modules_that_exist():
    """In comments, too."""
    command = r"python -m ((?:pipeline|sweeps|tools)[\w.]*)"
    named = {module for _, text in texts() for module in re.findall(command, text)}
    files = {module: REPOSITORY / module.rstrip(".").replace(".", "/") for module in named}
    assert named
    assert [name for name, file in files.items() if not (file.with_suffix(".py").is_file() or file.is_dir())] == []


@pytest.mark.parametrize(("where", "template"), pod_templates(), ids=[where for where, _ in pod_templates()])
def test_pods_have_no_rights_and_bounded_resources(where, template):
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}
        assert not [port for port in container.get("ports", []) if "hostPort" in port]


def test_kubernetes_services_are_reached_from_inside_alone():
    services = [document for name in MANIFESTS for document in documents(name) if document["kind"] == "Service"]
    assert {service["metadata"]["name"] for service in services} == {"mlflow", "postgres"}
    assert {service["spec"].get("type", "ClusterIP") for service in services} == {"ClusterIP"}
    assert "Ingress" not in {document["kind"] for name in MANIFESTS for document in documents(name)}


def test_selectors_select_pods_of_ours():
    pods = [template["metadata"]["labels"] for _, template in pod_templates()]
    wanted = []
    for document in (document for name in MANIFESTS for document in documents(name)):
        if document["kind"] == "Service":
            wanted.append(document["spec"]["selector"])
        wanted += [value for path, value in walk(document) if path and path[-1] == "matchLabels"]
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert operator in wanted
    assert [labels for labels in wanted if not any(labels.items() <= pod.items() for pod in pods)] == [operator]


def test_network_policies_select_every_pod_but_the_submitter():
    policies = [document for name in MANIFESTS for document in documents(name) if document["kind"] == "NetworkPolicy"]
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in policies]
    open_pods = {
        labels["app.kubernetes.io/component"]
        for labels in (template["metadata"]["labels"] for _, template in pod_templates())
        if not any(policy.items() <= labels.items() for policy in selected)
    }
    assert open_pods == {"submitter"}


SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIALS|ACCESS_KEY", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"://[^/\s:@]+:[^/\s@]+@"  # a password in an address
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b[0-9a-f]{32,}\b"
    r"|(?i:password|token|secret)[\w-]*[\"']?\s*[:=]\s*[\"']?(?=[\w+/-]*\d)[A-Za-z0-9+/_-]{12,}"
)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://mlflow:hunter2@postgres/mlflow",
        "POSTGRES_PASSWORD: a1b2c3d4e5f6g7h8",
        "auth_token = 0123456789abcdef0123456789abcdef",
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_secret_text_recognises_a_secret(text):
    assert SECRET_TEXT.search(text)


def test_files_have_no_secret():
    found = [f"{name}: {match[0]}" for name, text in texts() for match in SECRET_TEXT.finditer(text)]
    assert found == []


def test_compose_gives_secrets_as_files():
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key) and key != "RAY_AUTH_MODE":
                assert key.endswith(("_FILE", "_PATH")), (name, key)
                assert value.startswith("/run/secrets/"), (name, key)


def test_pods_get_secrets_by_reference():
    seen = set()
    for where, template in pod_templates():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]):
                    assert set(variable["valueFrom"]) == {"secretKeyRef"}, where
                    seen.add(variable["name"])
    assert {"PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= seen
    assert "Secret" not in {document["kind"] for name in MANIFESTS for document in documents(name)}


def created() -> dict[str, set[str]]:
    """Names of Secrets and ConfigMaps that the README's kubectl commands make, with their keys."""
    create = r"kubectl create (?:secret generic|configmap) ([\w-]+)((?:[^\n]*\\\n)*[^\n]*)"
    keys = {}
    for name, rest in re.findall(create, read("README.md")):
        literal = re.findall(r"--from-(?:literal|file)=([\w.-]+)=", rest)
        files = [Path(path).name for path in re.findall(r"--from-file=([\w./-]+)(?:\s|$)", rest)]
        keys[name] = {*literal, *files}
    return keys


def test_readme_makes_every_secret_and_setting_that_pods_read():
    made = created()
    for where, template in pod_templates():
        for path, value in walk(template):
            if path and path[-1] in ("secretKeyRef", "configMapKeyRef"):
                assert value["key"] in made[value["name"]], where
            if path and path[-1] in ("configMapRef", "configMap"):
                assert made[value["name"]], where
    assert made["ray-token"] == {"auth_token"}, "the key that KubeRay reads"
    assert made["mlflow-auth"] == {"basic_auth.ini"}
    assert made["attention-run"] >= {"RUN_STORAGE", "MLFLOW_TRACKING_URI", "GIT_COMMIT"}


def test_variables_of_another_store_reach_ray_and_the_mlflow_server():
    """AWS_ENDPOINT_URL and AWS_REGION, which a user adds to these two ConfigMaps."""
    sources = {
        container["name"]: [source["configMapRef"]["name"] for source in container.get("envFrom", [])]
        for _, template in pod_templates()
        for container in template["spec"]["containers"]
    }
    assert {name for name, found in sources.items() if found == ["attention-run"]} == {"ray-head", "ray-worker"}
    assert sources["mlflow"] == ["mlflow-settings"]


@pytest.mark.parametrize("name", RAY_UP)
def test_readme_has_the_region_and_the_machines_of(name):
    config = documents(name)[0]
    nodes = {key: node_type["node_config"] for key, node_type in config["available_node_types"].items()}
    head, gpu = (nodes[key].get("InstanceType") or nodes[key]["machineType"] for key in ("head", "gpu"))
    gpu_type = config["available_node_types"]["gpu"]
    (row,) = (line for line in read("README.md").splitlines() if line.startswith(f"| `{name}`, in "))
    place = config["provider"]["region"] if "aws" in name else config["provider"]["availability_zone"]
    assert f"in {place} | {head}, on demand |" in row
    assert f"| {gpu_type['min_workers']} to {gpu_type['max_workers']} {gpu}, spot: " in row
    assert f"{gpu_type['resources']['CPU']} CPUs" in row


def test_readme_asks_for_the_machine_image_of_the_region():
    (region,) = set(re.findall(r"aws ssm .*--region ([\w-]+)", read("README.md")))
    assert region == documents("ray-aws.yaml")[0]["provider"]["region"]


def test_readme_replaces_every_placeholder():
    used = {word for name, text in texts() if name.endswith(".yaml") for word in PLACEHOLDERS if word in text}
    assert used == set(PLACEHOLDERS)
    assert [word for word in PLACEHOLDERS if f"s|{word}|" not in read("README.md")] == []


def test_make_secrets_output_reaches_neither_git_nor_an_upload(tmp_path):
    for name in (".gitignore", "secrets/.gitignore"):
        copied = tmp_path / "infra" / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(read(name))
    subprocess.run([INFRA / "make-secrets.sh", tmp_path / "infra/secrets"], check=True)
    (tmp_path / "infra/aws.local.yaml").touch()
    (tmp_path / "infra/compose.yaml").touch()
    uploaded: list[str] = []
    _dir_travel(tmp_path, [], lambda path: uploaded.append(path.name), include_gitignore=True)
    assert "compose.yaml" in uploaded
    assert not {path.name for path in (tmp_path / "infra/secrets").iterdir() if path.name != ".gitignore"} & {
        *uploaded
    }
    assert "aws.local.yaml" not in uploaded
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    known = ["git", "-C", tmp_path, "ls-files", "--others", "--exclude-standard"]
    listed = subprocess.run(known, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == ["infra/.gitignore", "infra/compose.yaml", "infra/secrets/.gitignore"]


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_ray_start_knows_every_option():
    from ray.scripts.scripts import start

    lines = [
        line
        for name in RAY_UP
        for key in ("head", "worker")
        for line in documents(name)[0][f"{key}_start_ray_commands"]
    ]
    lines += [" ".join(compose()["services"][name]["command"]) for name in ("ray-head", "ray-worker")]
    used = {word.partition("=")[0] for line in lines for word in line.split() if word.startswith("--")}
    (cluster,) = documents("kuberay/raycluster.yaml")
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        used |= {f"--{key}" for key in group["rayStartParams"]}
    assert used
    assert used - options(start) == set()


def mlflow_servers() -> list[list[str]]:
    """Options and values of `mlflow server`, in Compose and on Kubernetes."""
    (deployment,) = (d for d in documents("mlflow/kubernetes.yaml") if d["kind"] == "Deployment")
    command = compose()["services"]["mlflow"]["command"][-1].replace("\\\n", " ")
    words = command[command.index("mlflow server") :].split()[2:]
    return [
        words,
        [
            word
            for arg in deployment["spec"]["template"]["spec"]["containers"][0]["args"]
            for word in arg.split("=", 1)
        ],
    ]


def test_mlflow_server_knows_every_option_of_both_servers():
    from mlflow.cli import server

    one, other = ({words[i]: words[i + 1] for i in range(0, len(words), 2)} for words in mlflow_servers())
    assert set(one) - options(server) == set()
    assert one.pop("--artifacts-destination") != other.pop("--artifacts-destination")
    assert one == other
    assert one["--app-name"] == "basic-auth"
    assert one["--workers"] == "1"


def test_mlflow_servers_open_databases_by_the_installed_driver():
    auth = configparser.ConfigParser()
    auth.read_string(read("mlflow/basic_auth.ini"))
    addresses = {auth["mlflow"]["database_uri"]}
    addresses |= {words[words.index("--backend-store-uri") + 1] for words in mlflow_servers()}
    (url,) = {sqlalchemy.engine.make_url(address) for address in addresses}
    assert url.get_dialect().driver == "psycopg2"
    assert url.password is None
    assert not auth.has_option("mlflow", "admin_password")
