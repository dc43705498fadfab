//! Weights saved by Transformers4Rec, by their names there.

/// The name here of what Transformers4Rec (0.1) calls `original` in the state dictionary of a session model whose body
/// is an MLP block and a GRU or Hugging Face's XLNet; `Ok(None)` for what no computation reads.
///
/// # Errors
/// A name of some other model.
pub fn name_of(original: &str) -> Result<Option<String>, String> {
    let unknown = || format!("`{original}` is no weight of a session model of Transformers4Rec");
    let rest = original.strip_prefix("heads.0.").ok_or_else(unknown)?;
    let linear = |prefix: &str, ours: &str| {
        let part = rest.strip_prefix(prefix)?;
        ["weight", "bias"].contains(&part).then(|| format!("{ours}.{part}"))
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
    let task = rest.find("task_block.").map_or(rest, |place| &rest[place..]);
    let in_task = task.strip_prefix("task_block.0.0.").map(|part| format!("head.projection.{part}"));
    linear("body.0.projection_module.0.0.", "input.projection")
        .or_else(|| linear("body.1.0.0.", "input.to_body"))
        .or(in_task)
        .map(Some)
        .ok_or_else(unknown)
}

/// The name without what DistributedDataParallel (`module.`) and `torch.compile` (`_orig_mod.`) put into it.
fn unwrapped(name: &str) -> String {
    let mut name = name.split('.').filter(|part| *part != "_orig_mod").collect::<Vec<_>>().join(".");
    while let Some(rest) = name.strip_prefix("module.") {
        name = rest.to_owned();
    }
    name
}

/// Renames a state dictionary, for a model whose parameters are named `wanted` and whose item id is the feature `item`.
///
/// # Errors
/// A name of some other model.
pub fn rename<T>(
    original: Vec<(String, T)>,
    item: &str,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<(String, T)>, String> {
    let item_table = format!("tables.{item}.weight");
    let mut renamed: Vec<(String, T)> = Vec::new();
    for (name, value) in original {
        let Some(ours) = name_of(&unwrapped(&name))? else { continue };
        let ours = if ours == item_table { "item_table.weight".to_owned() } else { ours };
        // The original has a mask vector even where nothing is ever hidden.
        if renamed.iter().any(|(other, _)| *other == ours) {
            return Err(format!("`{name}` is there twice, wrapped and as it is"));
        }
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
    fn wrappers_of_a_model_leave_its_names_alone() {
        let plain = "heads.0.body.2.module.weight_ih_l0";
        let names = |names: &[&str]| {
            let original = names.iter().map(|name| ((*name).to_owned(), ())).collect();
            rename(original, "item", |_| true)
                .map(|renamed| renamed.into_iter().map(|(name, ())| name).collect())
        };
        for prefix in ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."] {
            let found: Vec<String> = names(&[&format!("{prefix}{plain}")]).unwrap();
            assert_eq!(found, ["gru.weight_ih_l0"], "{prefix}");
        }
        let compiled: Vec<String> = names(&["heads.0.body._orig_mod.2.module.weight_ih_l0"]).unwrap();
        assert_eq!(compiled, ["gru.weight_ih_l0"]);
        let twice: Result<Vec<String>, String> = names(&[plain, &format!("module.{plain}")]);
        assert!(twice.unwrap_err().contains("is there twice"));
    }

    #[test]
    fn names_of_other_models_are_refused() {
        for name in
            ["bert.encoder.layer.0.weight", "heads.0.body.7.weight", "heads.0.body.1.0.0.running_mean"]
        {
            assert!(name_of(name).unwrap_err().contains(name));
        }
    }
}
