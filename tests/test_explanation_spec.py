import pytest
from google.cloud import aiplatform
from google.cloud.aiplatform.explain.metadata.tf.v2.saved_model_metadata_builder import SavedModelMetadataBuilder
from two_objects import export_network

from data.errors import InputError
from models.explainable import ExplainableModel
from models.explanation_spec import explanation_metadata, explanation_parameters

CLASS_NAMES = ["circle", "square"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExplainableModel:
    return ExplainableModel(str(export_network(tmp_path_factory.mktemp("two_objects") / "model")))


@pytest.mark.parametrize("method", ["integrated_gradients", "xrai"])
@pytest.mark.parametrize("baseline", ["blurred", "black", "white"])
def test_explanation_metadata_is_what_the_sdk_takes(method, baseline):
    metadata = aiplatform.explain.ExplanationMetadata(explanation_metadata(CLASS_NAMES, method=method, baseline=baseline))

    image = metadata.inputs["image"]
    assert image.modality == "image"
    assert list(image.input_baselines) == {"blurred": [], "black": [0.0], "white": [255.0]}[baseline]
    assert image.visualization.overlay_type.name == "GRAYSCALE"
    assert image.visualization.polarity.name == {"integrated_gradients": "BOTH", "xrai": "POSITIVE"}[method]
    assert image.visualization.type_.name == {"integrated_gradients": "PIXELS", "xrai": "TYPE_UNSPECIFIED"}[method]
    assert list(metadata.outputs["probabilities"].index_display_name_mapping) == CLASS_NAMES


def test_explanation_metadata_names_what_the_exported_model_has(model):
    metadata = aiplatform.explain.ExplanationMetadata(
        explanation_metadata(CLASS_NAMES, method="integrated_gradients", baseline="blurred")
    )

    # As the SDK finds them in the model by itself.
    built = SavedModelMetadataBuilder(model.folder, signature_name="xai_model", outputs_to_explain=["probabilities"])
    found = built.get_metadata_protobuf()
    (image,), (found_image,) = metadata.inputs.values(), found.inputs.values()
    (output,), (found_output,) = metadata.outputs.values(), found.outputs.values()
    assert image.input_tensor_name == found_image.input_tensor_name == "images"
    assert output.output_tensor_name == found_output.output_tensor_name == "probabilities"


def test_explanation_parameters_are_what_the_sdk_takes():
    parameters = aiplatform.explain.ExplanationParameters(
        explanation_parameters(
            method="integrated_gradients", baseline="blurred", image_size=224, num_steps=60, num_noisy_copies=3
        )
    )
    gradients = parameters.integrated_gradients_attribution
    assert gradients.step_count == 60
    assert gradients.blur_baseline_config.max_blur_sigma == 8
    assert gradients.smooth_grad_config.noise_sigma == 38.25
    assert gradients.smooth_grad_config.noisy_sample_count == 3
    assert parameters.top_k == 1
    assert "xrai_attribution" not in parameters

    parameters = aiplatform.explain.ExplanationParameters(
        explanation_parameters(method="xrai", baseline="black", image_size=224)
    )
    assert parameters.xrai_attribution.step_count == 50
    assert "blur_baseline_config" not in parameters.xrai_attribution
    assert "integrated_gradients_attribution" not in parameters


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "grad_cam"}, "Expected `method` to be integrated_gradients or xrai.* Received: method='grad_cam'"),
        ({"baseline": "mean"}, "Expected `baseline` to be blurred, black or white.* Received: baseline='mean'"),
        ({"num_steps": 101}, r"Expected `num_steps` in \[1, 100\].* Received: num_steps=101"),
        ({"num_noisy_copies": 51}, r"Expected `num_noisy_copies` in \[0, 50\].* Received: num_noisy_copies=51"),
    ],
)
def test_explanation_parameters_refuse_what_vertex_does_not_take(changed, message):
    with pytest.raises(InputError, match=message):
        explanation_parameters(**({"method": "xrai", "baseline": "blurred", "image_size": 224} | changed))
