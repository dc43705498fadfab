//! Names of weights that Transformers4Rec saved.

/// The parameter that Transformers4Rec (0.1) names `original` in the state dictionary of a session
/// model whose body is an MLP block and a GRU or Hugging Face's XLNet; `Ok(None)` for a weight that
/// no computation uses.
///
/// # Errors
/// The name belongs to another model.
pub fn parameter_name(original: &str) -> Result<Option<String>, String> {
    let unknown = || format!("`{original}` is not a weight of a Transformers4Rec session model");
    let rest = original.strip_prefix("heads.0.").ok_or_else(unknown)?;
    let linear = |prefix: &str, name: &str| {
        let part = rest.strip_prefix(prefix)?;
        ["weight", "bias"].contains(&part).then(|| format!("{name}.{part}"))
    };
    if let Some((_, table)) = rest.split_once(".embedding_tables.") {
        let feature = table.strip_suffix(".weight").ok_or_else(unknown)?;
        return Ok(Some(format!("tables.{feature}.weight")));
    }
    if let Some(part) = rest.strip_prefix("body.2.transformer.") {
        let unused = ["mask_emb", "word_embedding.weight"].contains(&part)
            || part.ends_with(".r_s_bias")
            || part.ends_with(".seg_embed");
        return Ok((!unused).then(|| format!("xlnet.{part}")));
    }
    if let Some(part) = rest.strip_prefix("body.2.module.") {
        return Ok(Some(format!("gru.{part}")));
    }
    if rest == "body.0._masking.masked_item_embedding" {
        return Ok(Some("input.mask".to_owned()));
    }
    if rest.ends_with(".pre.module.output_layer_bias") {
        return Ok(Some("item_table.bias".to_owned()));
    }
    let task = rest.find("task_block.").map_or(rest, |start| &rest[start..]);
    let in_task =
        task.strip_prefix("task_block.0.0.").map(|part| format!("head.projection.{part}"));
    linear("body.0.projection_module.0.0.", "input.projection")
        .or_else(|| linear("body.1.0.0.", "input.to_body"))
        .or(in_task)
        .map(Some)
        .ok_or_else(unknown)
}

/// The name without the prefixes of DistributedDataParallel (`module.`) and the parts that
/// `torch.compile` inserts (`_orig_mod.`).
fn without_wrappers(name: &str) -> String {
    let mut name =
        name.split('.').filter(|part| *part != "_orig_mod").collect::<Vec<_>>().join(".");
    while let Some(rest) = name.strip_prefix("module.") {
        name = rest.to_owned();
    }
    name
}

/// Renames a state dictionary for a model with the parameters `wanted`; `item` is the feature with
/// the item ids.
///
/// # Errors
/// A name belongs to another model, or two names are the same parameter.
pub fn rename<T>(
    original: Vec<(String, T)>,
    item: &str,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<(String, T)>, String> {
    let item_table = format!("tables.{item}.weight");
    let mut renamed: Vec<(String, T)> = Vec::new();
    for (name, value) in original {
        let Some(ours) = parameter_name(&without_wrappers(&name))? else { continue };
        let ours = if ours == item_table { "item_table.weight".to_owned() } else { ours };
        if renamed.iter().any(|(other, _)| *other == ours) {
            return Err(format!("`{name}` occurs twice, with and without a wrapper's prefix"));
        }
        // Transformers4Rec saves a mask vector even if the objective hides nothing.
        if ours != "input.mask" || wanted(&ours) {
            renamed.push((ours, value));
        }
    }
    Ok(renamed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_wrappers_are_removed() {
        let plain = "heads.0.body.2.module.weight_ih_l0";
        let names = |names: &[&str]| {
            let original = names.iter().map(|name| ((*name).to_owned(), ())).collect();
            rename(original, "item", |_| true)
                .map(|renamed| renamed.into_iter().map(|(name, ())| name).collect())
        };
        for prefix in ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]
        {
            let renamed: Vec<String> = names(&[&format!("{prefix}{plain}")]).unwrap();
            assert_eq!(renamed, ["gru.weight_ih_l0"], "{prefix}");
        }
        let compiled: Vec<String> =
            names(&["heads.0.body._orig_mod.2.module.weight_ih_l0"]).unwrap();
        assert_eq!(compiled, ["gru.weight_ih_l0"]);
        let twice: Result<Vec<String>, String> = names(&[plain, &format!("module.{plain}")]);
        assert!(twice.unwrap_err().contains("occurs twice"));
    }

    #[test]
    fn names_of_other_models_are_refused() {
        for name in [
            "bert.encoder.layer.0.weight",
            "heads.0.body.7.weight",
            "heads.0.body.1.0.0.running_mean",
        ] {
            assert!(parameter_name(name).unwrap_err().contains(name));
        }
    }
}
