//! Item vectors from what describes an item.
//!
//! The vector of an item is `e = k E[item] + Σ C_f[code_f(item)]`: one row for the id and one for
//! each attribute, at the input and in the scores alike, and the same for its bias. `k` is 1, or
//! for a random part of the items of a training step 0, so that attributes learn to stand alone.
//! `E` begins at zero: an item that training has not seen has the vector of its attributes.
//!
//! `e` is linear in the rows `C_f`, so that the gradient of `C_f[c]` is the sum of the gradients by
//! `e` over the items with code `c`.

use bireme_kernels::fixed_point::{from_fixed_point, to_fixed_point};
use tch::{Device, Kind, Tensor};

use super::attributes::{Attributes, Cells, attribute_columns};
use super::parameters::{Gradients, ParameterBuilder};
use super::rows::add_rows_deterministically;
use super::{ItemTable, Parameters};
use crate::collective::{CollectiveError, Reduce};
use crate::config::ContentConfig;
use crate::data::{Catalogue, DataError, Features, SessionFile};

/// Numbers of the columns of the attributes.
///
/// # Errors
/// An attribute is not among the features.
pub(super) fn content_columns(
    config: &ContentConfig,
    features: &Features,
) -> Result<Vec<usize>, String> {
    attribute_columns(config.attributes.as_deref(), "input.content.attributes", features)
}

/// Declares a table for each attribute: a vector of `width` and a bias for each code or bucket, `[n
/// codes, width + 1]`.
///
/// # Errors
/// An attribute is not among the features.
pub(super) fn declare_tables(
    config: &ContentConfig,
    features: &Features,
    width: i64,
    std: f64,
    builder: &mut ParameterBuilder,
) -> Result<(), String> {
    for column in content_columns(config, features)? {
        let feature = &features.columns()[column];
        let n_codes = match feature.cardinality() {
            Some(n_codes) if feature.is_categorical() => n_codes,
            _ => config.n_buckets + 1,
        };
        builder.vectors_and_bias(format!("content.{}.weight", feature.name), n_codes, width, std);
    }
    Ok(())
}

/// Attributes of the items, and the parameters with their vectors.
pub(super) struct Content {
    /// Number of the first attribute's table.
    first_table: usize,
    attributes: Attributes,
    /// Upper bounds of the buckets of each attribute with values, but the last bucket's; empty
    /// until a day was read.
    bounds: Vec<Vec<f32>>,
    /// Row of each item in each attribute's table, i64 `[V]`.
    codes: Vec<Tensor>,
    n_buckets: i64,
    id_dropout: f64,
    device: Device,
}

impl Content {
    /// `first_table`: the first that [`declare_tables`] declared.
    ///
    /// # Errors
    /// An attribute is not among the features.
    pub fn new(
        config: &ContentConfig,
        features: &Features,
        first_table: usize,
        device: Device,
    ) -> Result<Self, String> {
        let attributes = Attributes::new(content_columns(config, features)?, features);
        let &ContentConfig { n_buckets, id_dropout, .. } = config;
        let (bounds, codes) = (vec![Vec::new(); attributes.0.len()], Vec::new());
        let mut content =
            Self { first_table, attributes, bounds, codes, n_buckets, id_dropout, device };
        content.update_codes();
        Ok(content)
    }

    /// Takes the attributes of items from the events of a day, and those of items without events
    /// from the catalogue.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn add_day(
        &mut self,
        file: &SessionFile,
        catalogue: Option<&Catalogue>,
    ) -> Result<(), DataError> {
        for span in file.spans(0..file.n_sessions()) {
            let sessions = file.read(std::slice::from_ref(&span))?;
            (0..sessions.len()).for_each(|row| self.attributes.add(&sessions, row));
        }
        if let Some(catalogue) = catalogue {
            self.attributes.fill(catalogue);
        }
        // Buckets stay as they are, because their vectors are learnt.
        for (bounds, attribute) in self.bounds.iter_mut().zip(&self.attributes.0) {
            if let (true, Cells::Values(values)) = (bounds.is_empty(), &attribute.cells) {
                *bounds = quantiles(values, self.n_buckets);
            }
        }
        self.update_codes();
        Ok(())
    }

    fn update_codes(&mut self) {
        let codes = self.attributes.0.iter().zip(&self.bounds).map(|(attribute, bounds)| {
            let codes = match &attribute.cells {
                Cells::Codes(codes) => Tensor::from_slice(codes),
                Cells::Values(values) => {
                    let bucket = |&value: &f32| match value {
                        0.0 => 0,
                        _ => 1 + bounds.partition_point(|bound| *bound < value) as i64,
                    };
                    Tensor::from_slice(&values.iter().map(bucket).collect::<Vec<_>>())
                }
            };
            codes.to_device(self.device)
        });
        self.codes = codes.collect();
    }

    /// Attributes and buckets as a checkpoint holds them.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let bounds = self.attributes.0.iter().zip(&self.bounds);
        let bounds = bounds
            .filter(|(_, bounds)| !bounds.is_empty())
            .map(|(attribute, bounds)| (bounds_name(&attribute.name), Tensor::from_slice(bounds)));
        self.attributes.tensors().chain(bounds).collect()
    }

    /// Restores what [`Content::tensors`] returned, perhaps of a smaller catalogue.
    ///
    /// # Errors
    /// A tensor is missing or does not fit.
    pub fn load(&mut self, tensors: &[(String, Tensor)], n_items: i64) -> Result<(), String> {
        let find = |name: &str| tensors.iter().find(|(other, _)| other == name).map(|(_, x)| x);
        let required = |name: &str| find(name).ok_or_else(|| format!("`{name}` is missing"));
        self.attributes.load(required, n_items as usize)?;
        for (attribute, bounds) in self.attributes.0.iter().zip(&mut self.bounds) {
            let name = bounds_name(&attribute.name);
            if let Some(tensor) = find(&name) {
                *bounds = Vec::try_from(tensor).map_err(|e| format!("tensor `{name}`: {e}"))?;
            }
        }
        self.update_codes();
        Ok(())
    }

    /// Vectors and biases of `items: [N]` in the step with this seed, i64 `[]`, if any: those of
    /// their ids, `of_ids: [N, D + 1]`, and those of their attributes. `[N, D + 1]`.
    pub fn add_to(
        &self,
        parameters: &Parameters,
        items: &Tensor,
        of_ids: &Tensor,
        step_seed: Option<&Tensor>,
    ) -> Tensor {
        let of_ids = match step_seed.and_then(|seed| self.keeps_id(items, seed)) {
            Some(keeps_id) => of_ids * keeps_id.unsqueeze(1),
            None => of_ids.shallow_clone(),
        };
        let of_attributes = self.codes.iter().zip(self.first_table..).map(|(codes, table)| {
            let rows = codes.index_select(0, items);
            parameters.leaf(table).detach().index_select(0, &rows)
        });
        of_attributes.fold(of_ids, |sum, rows| sum + rows)
    }

    /// 1 for items that keep their id's vector in the step with this seed, i64 `[]`, 0 for the
    /// others: f32 `[N]`. `None` if all keep it.
    pub fn keeps_id(&self, items: &Tensor, seed: &Tensor) -> Option<Tensor> {
        (self.id_dropout > 0.0).then(|| {
            // SplitMix64 (Steele et al. 2014) of item and seed: any rank finds the same for an
            // item, whichever items it asks for.
            let mixed = |x: Tensor, shift: i64, factor: u64| {
                let x: Tensor = x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(shift));
                x * (factor as i64)
            };
            let x = items * (0x9e37_79b9_7f4a_7c15_u64 as i64) + seed;
            let x = mixed(mixed(x, 30, 0xbf58_476d_1ce4_e5b9), 27, 0x94d0_49bb_1331_11eb);
            let uniform = x.bitwise_right_shift_tensor_scalar(31).bitwise_and(0xff_ffff);
            uniform.ge(self.id_dropout * f64::from(1 << 24)).to_kind(Kind::Float)
        })
    }

    /// *All ranks*, if the item table is sharded. Adds the gradients `[N, D + 1]` by the vectors
    /// and biases of `items: [N]`, which this rank holds, to those of their attributes' vectors.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn add_gradients(
        &self,
        gradients: &Gradients,
        item_table: &ItemTable<'_>,
        items: &Tensor,
        of_items: &Tensor,
    ) -> Result<(), CollectiveError> {
        for (codes, table) in self.codes.iter().zip(self.first_table..) {
            let codes = codes.index_select(0, items);
            let mut of_table = gradients.of(table);
            let ranks = item_table.ranks();
            if ranks.is_none() && self.device == Device::Cpu {
                add_rows_deterministically(&mut of_table, &codes, of_items);
                continue;
            }
            // In fixed point, so that the sum depends neither on the number of shards nor on the
            // order in which a GPU adds the many items of a code.
            let mut sums = of_table.zeros_like().to_kind(Kind::Int64);
            let terms = to_fixed_point(of_items);
            let index = codes.unsqueeze(1).expand_as(&terms);
            let _ = sums.scatter_add_(0, &index, &terms);
            if let Some(ranks) = ranks {
                ranks.all_reduce(&mut sums, Reduce::Sum)?;
            }
            of_table += from_fixed_point(&sums);
        }
        Ok(())
    }
}

fn bounds_name(attribute: &str) -> String {
    format!("bounds.{attribute}")
}

/// Upper bounds of `n_buckets` equally full buckets of the values other than 0, but the last
/// bucket's.
fn quantiles(values: &[f32], n_buckets: i64) -> Vec<f32> {
    let mut known: Vec<f32> = values.iter().copied().filter(|value| *value != 0.0).collect();
    known.sort_by(f32::total_cmp);
    let bound = |bucket: usize| known.get(bucket * known.len() / n_buckets as usize).copied();
    (1..n_buckets as usize).filter_map(bound).collect()
}
