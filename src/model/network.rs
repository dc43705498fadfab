//! A neural next-item model: input block, body, softmax over the catalogue.

use std::ops::Range;

use bireme_kernels::autograd::{add_all, backward};
use bireme_kernels::parallel::torch_in_parallel;
use bireme_kernels::transfer::send_together;
use tch::{Device, Kind, Reduction, Tensor};

use super::Objective;
use super::content::{self, Content};
use super::encoder::{Encoder, EncoderInput, rows_of_part};
use super::evidence::{CandidateScorer, CandidateSearch, Candidates, Counts};
use super::head::{CrossEntropy, Negatives, ScoringTable, Targets, Workspace, cross_entropy};
use super::input::{Input, Lookup};
use super::item_vectors::{Composition, ItemVectors};
use super::objective::Plan;
use super::parameters::{Gradients, Linear, ParameterBuilder};
use super::prepare::{PreparedBatch, PreparedSessions, Preparer};
use super::rows::{add_rows, add_rows_deterministically, joined};
use super::start::{factors_of_pairs, pretrained_vectors, scaled};
use super::{
    CandidateIndex, Encoded, GradientHooks, ItemTable, Neural, Parameters, Recommender, RowList,
    SparseScores, View,
};
use crate::collective::CollectiveError;
use crate::collective::phase_timer::PhaseTimer;
use crate::config::{InputConfig, Reminders, StartConfig};
use crate::data::{
    Batch, Catalogue, DataError, DropoutGenerator, Features, Pretrained, SessionFile, with_seed,
};

/// The item table is parameter 0, the bias of its scores parameter 1; other tables follow, then all
/// other parameters.
pub(super) const ITEM_TABLE: usize = 0;
pub(super) const ITEM_BIAS: usize = 1;

/// Names of the item tables, which may be sharded.
pub const ITEM_TABLES: [&str; 3] = ["item_table.weight", "item_table.bias", "head.table.weight"];

const FLOAT_CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Prefix of the names of counts among the weights of a checkpoint.
pub const COUNTS: &str = "counts.";

/// Prefix of those of them that say what items are.
const COUNTED_CONTENT: &str = "counts.content.";

/// Loss of a backward pass as a sum: the division by the targets of all ranks comes last. Both are
/// on the device.
pub struct LossSum {
    /// Summed cross entropy, scalar f64.
    pub loss: Tensor,
    /// Number of targets, f32 `[1]`.
    pub n_targets: Tensor,
}

/// A model with its parameters and their gradients.
pub struct Network<'a> {
    parameters: Parameters,
    gradients: Gradients,
    encoder: Encoder,
    objective: Objective,
    /// Classifies events as original or replaced, for [`Objective::Replaced`].
    detector: Option<Linear>,
    /// Scores of candidates from counts.
    evidence: Option<Evidence>,
    /// How item vectors follow from the parameters.
    composition: Composition,
    /// The table that items are scored against.
    scored_table: usize,
    /// Number of tables and of vectors as long as a table, which come first among the parameters.
    n_tables: usize,
    item_table: ItemTable<'a>,
    max_length: usize,
    workspace: Workspace,
}

/// Counts, and the network that scores candidates by them.
struct Evidence {
    index: CandidateIndex,
    scorer: CandidateScorer,
}

/// Gradients by the parameters `others`, undefined for those that no output depends on, and by the
/// looked-up vectors, given those of `outputs`.
fn backward_from(
    outputs: &[(&Tensor, &Tensor)],
    parameters: &Parameters,
    others: Range<usize>,
    looked_up: &[Tensor],
) -> Vec<Tensor> {
    let leaves = others.clone().map(|index| parameters.leaf(index));
    let inputs: Vec<&Tensor> = leaves.chain(looked_up).collect();
    let mut gradients = backward(outputs, &inputs);
    for (gradient, vectors) in gradients[others.len()..].iter_mut().zip(looked_up) {
        if !gradient.defined() {
            *gradient = vectors.detach().zeros_like();
        }
    }
    gradients
}

/// Joins the rows of consecutive parts. Each part ends with the row of its padding event, of which
/// only the last is kept.
fn join_parts<'a>(parts: impl ExactSizeIterator<Item = &'a Tensor>) -> Tensor {
    let last = parts.len() - 1;
    let rows: Vec<Tensor> = parts
        .enumerate()
        .map(|(number, part)| {
            if number == last {
                part.shallow_clone()
            } else {
                part.narrow(0, 0, part.size()[0] - 1)
            }
        })
        .collect();
    joined(rows)
}

/// A part of a batch after the forward pass through the encoder.
struct EncodedPart {
    /// Vectors of the part's targets, `[n, D]`.
    vectors: Tensor,
    /// Terms of the scores of their candidates, `[n, E]`.
    sparse: Option<SparseScores>,
    parameters: Parameters,
    /// Looked-up vectors, leaves of the part's autograd graph.
    looked_up: Vec<Tensor>,
    /// Uses of dropout so far.
    n_sites: u32,
}

/// The events that replaced-item detection classifies.
struct Detection<'a> {
    /// `[T + 1]`, with replaced items.
    columns: &'a [Tensor],
    swap_sources: &'a [Tensor],
    /// The items before, i64 `[T + 1]`.
    original: &'a Tensor,
    sessions: &'a PreparedSessions,
    step_seed: &'a Tensor,
}

/// The columns `[T + 1]` after swap noise with the given sources, if any.
fn with_swap_noise(columns: &[Tensor], sources: &[Tensor]) -> Vec<Tensor> {
    if sources.is_empty() {
        return columns.iter().map(Tensor::shallow_clone).collect();
    }
    columns.iter().zip(sources).map(|(column, sources)| column.index_select(0, sources)).collect()
}

/// The targets of a batch.
struct StepTargets {
    targets: Targets,
    /// Targets of each rank.
    counts: Vec<i64>,
    /// i64 `[]`.
    step_seed: Tensor,
}

/// The sparse scores of all parts, without the graph.
fn join_sparse(parts: &[EncodedPart]) -> Option<SparseScores> {
    let of_parts: Option<Vec<&SparseScores>> =
        parts.iter().map(|part| part.sparse.as_ref()).collect();
    let join = |of: fn(&SparseScores) -> Tensor| {
        of_parts.as_ref().map(|parts| joined(parts.iter().map(|part| of(part)).collect()))
    };
    let items = join(|part| part.items.shallow_clone())?;
    Some(SparseScores { items, scores: join(|part| part.scores.detach())? })
}

/// Where the parameters of a model are.
struct Declared {
    scored_table: usize,
    /// The first of the attributes' tables.
    first_content: usize,
    n_tables: usize,
    encoder: Encoder,
    detector: Option<Linear>,
    scorer: Option<CandidateScorer>,
}

fn declare_parameters(
    config: &Neural<'_>,
    features: &Features,
    max_length: usize,
    table: &ItemTable<'_>,
    builder: &mut ParameterBuilder,
) -> Result<Declared, String> {
    let (input, head, objective) = (config.input(), config.head(), config.objective());
    let id_std = if input.content.is_some() { 0.0 } else { input.init_std };
    builder.item_table(ITEM_TABLES[0], input.item_width, id_std, table);
    builder.item_bias(ITEM_TABLES[1], 0.0, table);
    let scored_table = if head.tied {
        ITEM_TABLE
    } else {
        builder.item_table(ITEM_TABLES[2], input.item_width, input.init_std, table)
    };
    let first_table = builder.len();
    Input::declare_tables(input, features, builder);
    let first_content = builder.len();
    if let Some(config) = &input.content {
        content::declare_tables(config, features, input.item_width, input.init_std, builder)?;
    }
    let n_tables = builder.len();
    let encoder = Encoder::declare(config, features, first_table, max_length, builder)?;
    let is_replaced = matches!(objective, Objective::Replaced { .. });
    let detector = is_replaced.then(|| builder.linear("detector", config.width(), 1));
    let scorer = head
        .evidence
        .as_ref()
        .map(|evidence| CandidateScorer::declare(evidence, features, config.width(), builder));
    let scorer = scorer.transpose()?;
    Ok(Declared { scored_table, first_content, n_tables, encoder, detector, scorer })
}

/// Names and shapes of a model's parameters.
pub struct ParameterSizes {
    /// In the order of the flat buffers: tables first.
    pub named: Vec<(String, Vec<i64>)>,
    /// How many of them are tables.
    pub n_tables: usize,
}

impl ParameterSizes {
    /// The parameters that [`Network::new`] would create.
    ///
    /// # Errors
    /// The configuration does not fit the features.
    pub fn new(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        table: &ItemTable<'_>,
    ) -> Result<Self, String> {
        let mut builder = ParameterBuilder::sizes_only();
        let declared = declare_parameters(config, features, max_length, table, &mut builder)?;
        Ok(Self { named: builder.into_sizes(), n_tables: declared.n_tables })
    }
}

impl Network<'static> {
    /// A network whose rank holds all rows of the item table.
    ///
    /// # Errors
    /// The configuration does not fit the features.
    pub fn new(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        seed: u64,
        device: Device,
    ) -> Result<Self, String> {
        let item_table = ItemTable::replicated(features.n_items());
        let reminders = Reminders::All;
        Network::with_item_table(config, features, max_length, reminders, seed, device, item_table)
    }
}

impl<'a> Network<'a> {
    /// Draws initial parameters, the same on every rank for the same `seed`. `reminders`: which
    /// known items candidates may be. If `item_table` is
    /// sharded, all ranks make backward passes and score together.
    ///
    /// # Errors
    /// The configuration does not fit the features.
    pub fn with_item_table(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        reminders: Reminders,
        seed: u64,
        device: Device,
        item_table: ItemTable<'a>,
    ) -> Result<Self, String> {
        let mut builder = ParameterBuilder::default();
        let declared = with_seed(seed, || {
            declare_parameters(config, features, max_length, &item_table, &mut builder)
        });
        let Declared { scored_table, first_content, n_tables, encoder, detector, scorer } =
            declared?;
        let parameters = Parameters::new(builder, device);
        let evidence = scorer.zip(config.head().evidence.as_ref()).map(|(scorer, evidence)| {
            let candidates = &evidence.candidates;
            let index = CandidateIndex::new(candidates, features, reminders, max_length, device)?;
            Ok::<_, String>(Evidence { index, scorer })
        });
        let evidence = evidence.transpose()?;
        let content = config.input().content.as_ref();
        let content = content.map(|content| Content::new(content, features, first_content, device));
        Ok(Self {
            gradients: parameters.zero_gradients(),
            parameters,
            encoder,
            objective: config.objective().clone(),
            detector,
            evidence,
            composition: Composition {
                content: content.transpose()?,
                is_normalised: config.head().cosine,
                is_learnt: None,
            },
            scored_table,
            n_tables,
            item_table,
            max_length,
            workspace: Workspace::default(),
        })
    }

    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    pub fn gradients_mut(&mut self) -> &mut Gradients {
        &mut self.gradients
    }

    /// The tables, which are first in the flat buffers; a step changes few of their rows.
    pub fn tables(&self) -> &[View] {
        &self.parameters.views()[..self.n_tables]
    }

    /// Numbers of the parameters that items are scored with, which are adjacent.
    pub fn scoring_parameters(&self) -> Range<usize> {
        self.scored_table.min(ITEM_BIAS)..self.scored_table.max(ITEM_BIAS) + 1
    }

    /// Whether the scoring gradients are complete before the backward pass through the encoder.
    /// Replaced-item detection looks items up a second time.
    pub fn scores_once(&self) -> bool {
        self.detector.is_none()
    }

    pub fn objective(&self) -> &Objective {
        &self.objective
    }

    /// Whether the vectors of items are the rows of the item table, all of which are learnt.
    pub fn items_are_rows(&self) -> bool {
        self.items(None).are_rows() && self.composition.is_learnt.is_none()
    }

    pub fn item_table(&self) -> &ItemTable<'a> {
        &self.item_table
    }

    /// The parameters, and the counts that candidates are found by, as a checkpoint holds them.
    pub fn weights(&self) -> Vec<(String, Tensor)> {
        let mut weights = self.parameters.named(&self.parameters.values());
        let counts = self.evidence.iter().flat_map(|evidence| evidence.index.tensors());
        weights.extend(counts.map(|(name, tensor)| (COUNTS.to_owned() + &name, tensor)));
        let content = self.composition.content.iter().flat_map(Content::tensors);
        weights.extend(content.map(|(name, tensor)| (COUNTED_CONTENT.to_owned() + &name, tensor)));
        weights
    }

    /// Loads what [`Network::weights`] of another network returned; of sharded tables, this rank's
    /// rows.
    ///
    /// # Errors
    /// Names the first tensor that does not fit.
    pub fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        let (counts, weights): (Vec<_>, Vec<_>) =
            weights.iter().partition(|(name, _)| name.starts_with(COUNTS));
        let counts =
            counts.into_iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        self.load_counts(&counts.collect::<Vec<_>>())?;
        let local = weights
            .into_iter()
            .map(|(name, tensor)| (name.clone(), self.item_table.local_part(name, tensor)));
        self.parameters.assign(&self.parameters.values(), &local.collect::<Vec<_>>(), &[])
    }

    /// Loads the counts of [`Network::weights`].
    ///
    /// # Errors
    /// Names the first tensor that does not fit.
    pub fn load_counts(&mut self, counts: &[(String, Tensor)]) -> Result<(), String> {
        let (content, counts): (Vec<_>, Vec<_>) =
            counts.iter().partition(|(name, _)| name.starts_with(COUNTED_CONTENT));
        let without_prefix = |named: &[&(String, Tensor)], prefix: &str| -> Vec<(String, Tensor)> {
            let tensors = named.iter();
            tensors.map(|(name, x)| (name[prefix.len()..].to_owned(), x.shallow_clone())).collect()
        };
        let unexpected = |named: &[&(String, Tensor)]| match named.first() {
            Some((name, _)) => Err(format!("unknown parameter `{name}`")),
            None => Ok(()),
        };
        match &mut self.evidence {
            Some(evidence) => evidence.index.load(&without_prefix(&counts, COUNTS))?,
            None => unexpected(&counts)?,
        }
        match &mut self.composition.content {
            Some(of_items) => {
                let tensors = without_prefix(&content, COUNTED_CONTENT);
                of_items.load(&tensors, self.item_table.n_items)
            }
            None => unexpected(&content),
        }
    }

    /// Prepares training on the sessions of a day, which is later than all days before: takes the
    /// attributes of their items, and those of other items from the catalogue. The first day is
    /// counted, because there are no counts of days before.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn begin_day(
        &mut self,
        day: i64,
        file: &SessionFile,
        catalogue: Option<&Catalogue>,
    ) -> Result<(), DataError> {
        if let Some(evidence) = &mut self.evidence
            && evidence.index.last_day().is_none()
        {
            evidence.index.add_day(day, file)?;
        }
        let content = self.composition.content.as_mut();
        content.map_or(Ok(()), |content| content.add_day(file, catalogue))
    }

    /// Sets the vectors of items to what they begin as. `file`: the first day; `pretrained`:
    /// vectors from a file. `start`, `init_std`: see [`InputConfig`](crate::config::InputConfig).
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn start_vectors(
        &mut self,
        input: &InputConfig,
        seed: u64,
        file: &SessionFile,
        pretrained: Option<&Pretrained>,
    ) -> Result<(), DataError> {
        let (n_items, width) = (self.item_table.n_items, input.item_width);
        let (items, vectors) = match (&input.start, pretrained) {
            (Some(StartConfig::PairCounts {}), _) => {
                let mut counts = Counts::of_items(n_items);
                counts.add_day(file.day(), file)?;
                let items = Tensor::arange(n_items, (Kind::Int64, Device::Cpu));
                (items, factors_of_pairs(&counts, width, seed))
            }
            (Some(StartConfig::File { .. }), Some(pretrained)) => {
                (Tensor::from_slice(&pretrained.items), pretrained_vectors(pretrained, width))
            }
            _ => return Ok(()),
        };
        let vectors = scaled(&vectors, input.init_std);
        let located = self.item_table.locate(&items);
        let is_local = located.mask(Tensor::ones([items.size()[0]], FLOAT_CPU));
        let chosen = is_local.nonzero().squeeze_dim(1);
        let device = self.device();
        tch::no_grad(|| {
            let rows = located.rows.index_select(0, &chosen).to_device(device);
            let vectors = vectors.index_select(0, &chosen).to_device(device);
            let _ = self.parameters.leaf(ITEM_TABLE).detach().index_copy_(0, &rows, &vectors);
        });
        Ok(())
    }

    /// Keeps the vectors of `items` as they are.
    pub fn freeze_items(&mut self, items: &[i64]) {
        let located = self.item_table.locate(&Tensor::from_slice(items));
        let is_local = located.mask(Tensor::ones([items.len() as i64], FLOAT_CPU));
        let n_local = self.item_table.len();
        let is_frozen = Tensor::zeros([n_local], FLOAT_CPU);
        let is_frozen = is_frozen.scatter_add(0, &located.rows, &is_local).gt(0.0);
        let is_learnt = is_frozen.logical_not().to_kind(Kind::Float);
        self.composition.is_learnt = Some(is_learnt.to_device(self.device()));
    }

    /// Counts the sessions of a day that was trained on.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn end_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError> {
        match &mut self.evidence {
            Some(evidence) if evidence.index.last_day() < Some(day) => {
                evidence.index.add_day(day, file)
            }
            _ => Ok(()),
        }
    }

    /// *All ranks*, if the item table is sharded. Completes the gradients after those of the item
    /// table were summed over the ranks; `step_seed`: of the step's batches.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn finish_gradients(&mut self, step_seed: &Tensor) -> Result<(), CollectiveError> {
        let Self { parameters, composition, gradients, item_table, .. } = self;
        let items = ItemVectors::new(parameters, composition, item_table, Some(step_seed));
        items.finish_gradients(gradients, item_table)
    }

    /// The item vectors of the step with this seed, or outside training.
    fn items<'n>(&'n self, step_seed: Option<&'n Tensor>) -> ItemVectors<'n> {
        ItemVectors::new(&self.parameters, &self.composition, &self.item_table, step_seed)
    }

    /// Frees memory that only backward passes need.
    pub fn free_workspace(&mut self) {
        self.workspace = Workspace::default();
    }

    /// Prepares batches for this network on the days that it has counted.
    pub fn preparer(&self) -> Preparer {
        let Encoder { input, input_dropout, padded_length, .. } = &self.encoder;
        let is_on_gpu = self.device() != Device::Cpu;
        // On a CPU the encoder's operations are too small to use all threads, so that parts of a
        // batch go through it, each on its own threads. The detector applies dropout to the whole
        // batch.
        let is_whole = is_on_gpu || self.detector.is_some();
        Preparer {
            objective: self.objective.clone(),
            attends: self.encoder.attends(),
            is_on_gpu,
            n_parts: if is_whole { 1 } else { tch::get_num_threads().max(1) as usize },
            drops_inputs: *input_dropout > 0.0,
            swap_noise: input.swap_noise,
            padded_length: *padded_length,
            max_positions: padded_length.unwrap_or(0).max(self.max_length),
            candidates: self.evidence.as_ref().map(|evidence| evidence.index.preparer()),
        }
    }

    /// *All ranks*, if the item table is sharded. Adds the gradients of the loss over a prepared
    /// batch, whose tensors are on the device of the model, and returns the loss. A batch without
    /// sessions adds nothing, but takes part in the exchanges.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn backward(
        &mut self,
        batch: &PreparedBatch,
        negatives: &Negatives,
        hooks: &mut dyn GradientHooks,
        timer: &mut PhaseTimer,
    ) -> Result<LossSum, CollectiveError> {
        let &PreparedBatch { ref step_seed, ref n_outputs, is_sized, .. } = batch;
        let n_targets = batch.n_targets.shallow_clone();
        let counts = self.item_table.gather_counts(n_outputs.iter().sum(), is_sized)?;
        if counts.iter().sum::<i64>() == 0 {
            return self.backward_without_targets(n_targets, hooks);
        }
        let mut dropout = DropoutGenerator::new(self.max_length);
        let columns = with_swap_noise(&batch.columns, &batch.swap_sources);
        let items = self.items(Some(step_seed));
        let lookups = self.encoder.input.look_up(&items, &columns, &self.item_table, is_sized)?;
        let targets = Targets {
            items: batch.columns[0].index_select(0, &batch.predicted),
            micro_batches: batch.micro_batches.shallow_clone(),
            weights: batch.weights.as_ref().map(Tensor::shallow_clone),
            uniform: batch.uniform.as_ref().map(Tensor::shallow_clone),
        };
        let targets = StepTargets { targets, counts, step_seed: step_seed.shallow_clone() };
        let input = EncoderInput::whole(columns, &lookups);
        let encoded = self.encode_parts(batch, &input, &dropout);
        timer.end("forward");

        let vectors: Vec<Tensor> = encoded.iter().map(|part| part.vectors.detach()).collect();
        let vectors = Encoded { vectors: joined(vectors), sparse: join_sparse(&encoded) };
        let CrossEntropy { mut loss, state_gradient, sparse_gradient, drawn } =
            self.score(&vectors, &targets, negatives, hooks)?;
        timer.end("loss");

        let n_sites = encoded.iter().map(|part| part.n_sites).max().unwrap_or(0);
        let by_part = |gradient: &Tensor| gradient.split_with_sizes(n_outputs.as_slice(), 0);
        let sparse_gradients: Vec<Option<Tensor>> = match &sparse_gradient {
            Some(gradient) => by_part(gradient).into_iter().map(Some).collect(),
            None => n_outputs.iter().map(|_| None).collect(),
        };
        let gradients = by_part(&state_gradient).into_iter().zip(sparse_gradients);
        let others = self.other_parameters();
        let mut work: Vec<_> = encoded.into_iter().zip(gradients).collect();
        let mut of_parts = Vec::new();
        // The scoring gradients are complete, so they may be reduced while the encoder's are
        // formed.
        hooks.scoring_complete(&mut self.gradients, &mut || {
            of_parts = torch_in_parallel(std::mem::take(&mut work), |(part, gradients)| {
                let EncodedPart { vectors, sparse, parameters, looked_up, .. } = part;
                let (state_gradient, sparse_gradient) = gradients;
                let mut outputs = vec![(&vectors, &state_gradient)];
                if let (Some(sparse), Some(gradient)) = (&sparse, &sparse_gradient) {
                    outputs.push((&sparse.scores, gradient));
                }
                backward_from(&outputs, &parameters, others.clone(), &looked_up)
            });
        })?;
        self.add_gradients(&of_parts, &lookups, is_sized, hooks)?;
        dropout.set_n_sites(n_sites);
        if let (Some(detector), Some(drawn), Some(sessions), Objective::Replaced { weight, .. }) =
            (self.detector, drawn, &batch.detection, &self.objective)
        {
            let mut columns: Vec<Tensor> =
                batch.columns.iter().map(Tensor::shallow_clone).collect();
            columns[0] = batch.columns[0].index_copy(0, &batch.predicted, &drawn);
            let detection = Detection {
                columns: &columns,
                swap_sources: &batch.swap_sources,
                original: &batch.columns[0],
                sessions,
                step_seed,
            };
            loss += self.detect(detector, *weight, &detection, &mut dropout, hooks)?;
        }
        timer.end("backward");
        Ok(LossSum { loss, n_targets })
    }

    /// *All ranks*, if the item table is sharded or its gradient is reduced early. This rank has no
    /// targets, but other ranks may have, so it takes part in every exchange of a pass.
    fn backward_without_targets(
        &mut self,
        n_targets: Tensor,
        hooks: &mut dyn GradientHooks,
    ) -> Result<LossSum, CollectiveError> {
        hooks.scoring_complete(&mut self.gradients, &mut || ())?;
        let rows = Tensor::zeros([0], (Kind::Int64, self.device()));
        let vectors = self.parameters.leaf(ITEM_TABLE).narrow(0, 0, 0).detach();
        self.add_late_rows(&rows, &vectors, false, hooks)?;
        Ok(LossSum { loss: Tensor::zeros([], (Kind::Double, self.device())), n_targets })
    }

    /// Encodes the parts of a batch, each with its own autograd graph. `input`: of the whole batch,
    /// with swap noise.
    fn encode_parts(
        &self,
        batch: &PreparedBatch,
        input: &EncoderInput,
        dropout: &DropoutGenerator,
    ) -> Vec<EncodedPart> {
        let (mut work, mut first) = (Vec::with_capacity(batch.parts.len()), 0);
        for (part, n_events) in batch.parts.iter().zip(&batch.n_events) {
            // Handles of tensors may be sent to another thread, but not shared with it.
            let sessions = part.sessions.share();
            let candidates = self.evidence.as_ref().zip(part.search.as_ref());
            let candidates = candidates.map(|(evidence, search)| {
                let columns: Vec<Tensor> =
                    batch.columns.iter().map(|x| rows_of_part(x, first, *n_events)).collect();
                (evidence.scorer, evidence.index.find(search, &columns))
            });
            let input = input.part(first, *n_events).into_leaves();
            work.push((self.parameters.share(), input, candidates, sessions));
            first += n_events;
        }
        let encoder = &self.encoder;
        torch_in_parallel(work, |(parameters, input, candidates, sessions)| {
            let mut dropout = dropout.clone();
            let states = encoder.states(&parameters, &input, &sessions, Some(&mut dropout));
            let vectors = encoder.vectors(&parameters, &states);
            let sparse = candidates
                .map(|(scorer, candidates)| scorer.scores(&parameters, &candidates, &states));
            EncodedPart {
                vectors,
                sparse,
                parameters,
                looked_up: input.vectors,
                n_sites: dropout.n_sites(),
            }
        })
    }

    /// *All ranks*, if the item table is sharded. The loss of targets given what they are scored
    /// by; adds the gradients of the scoring parameters.
    fn score(
        &mut self,
        encoded: &Encoded,
        targets: &StepTargets,
        negatives: &Negatives,
        hooks: &mut dyn GradientHooks,
    ) -> Result<CrossEntropy, CollectiveError> {
        let Self {
            parameters, gradients, item_table, workspace, scored_table, composition, ..
        } = self;
        let items = ItemVectors::new(parameters, composition, item_table, Some(&targets.step_seed));
        let lists = (gradients.n_listed() > 0).then(|| [RowList::default(), RowList::default()]);
        let mut listed = None;
        let loss = tch::no_grad(|| {
            let mut weights = parameters.leaf(*scored_table).detach();
            let mut bias = parameters.leaf(ITEM_BIAS).detach();
            let of_rows = match negatives {
                // Every row is read.
                Negatives::Full { .. } => {
                    (weights, bias) = items.of_range(0, weights, bias);
                    None
                }
                Negatives::Sampled { .. } => (!items.are_rows()).then_some(items),
            };
            let mut scored = ScoringTable {
                weights,
                bias,
                items: of_rows,
                weight_gradient: gradients.of(*scored_table),
                bias_gradient: gradients.of(ITEM_BIAS),
                row_lists: lists,
                item_table,
                counts: &targets.counts,
                group_added: &mut || hooks.shard_updated(gradients),
            };
            let loss = cross_entropy(encoded, &targets.targets, &mut scored, negatives, workspace);
            listed = scored.row_lists;
            loss
        })?;
        for (index, list) in
            [*scored_table, ITEM_BIAS].into_iter().zip(listed.into_iter().flatten())
        {
            if let (Some(to), Some((rows, of_rows))) = (gradients.list_of(index), list.joined()) {
                to.add(&rows, &of_rows);
            }
        }
        Ok(loss)
    }

    /// Replaced-item detection (ELECTRA, Clark et al. 2020): classifies every event as original or
    /// replaced. Adds the gradients and returns the weighted loss.
    fn detect(
        &mut self,
        detector: Linear,
        weight: f64,
        detection: &Detection<'_>,
        dropout: &mut DropoutGenerator,
        hooks: &mut dyn GradientHooks,
    ) -> Result<Tensor, CollectiveError> {
        let &Detection { columns, swap_sources, original, sessions, step_seed } = detection;
        let n_events = original.size()[0] - 1;
        let is_replaced = columns[0].ne_tensor(original).narrow(0, 0, n_events);
        let is_replaced = is_replaced.to_kind(Kind::Float);
        let columns = with_swap_noise(columns, swap_sources);
        let items = self.items(Some(step_seed));
        let lookups = self.encoder.input.look_up(&items, &columns, &self.item_table, false)?;
        let input = EncoderInput::whole(columns, &lookups).into_leaves();
        let states = self.encoder.states(&self.parameters, &input, sessions, Some(dropout));
        let logits = detector.apply(&self.parameters, &states).squeeze_dim(1);
        let no_weight = None::<&Tensor>;
        let loss = weight
            * logits.binary_cross_entropy_with_logits(
                &is_replaced,
                no_weight,
                no_weight,
                Reduction::Sum,
            );
        let gradients = backward_from(
            &[(&loss, &loss.ones_like())],
            &self.parameters,
            self.other_parameters(),
            &input.vectors,
        );
        self.add_gradients(&[gradients], &lookups, false, hooks)?;
        Ok(loss.detach().to_kind(Kind::Double))
    }

    /// Numbers of the parameters that are not tables.
    fn other_parameters(&self) -> Range<usize> {
        self.n_tables..self.parameters.views().len()
    }

    /// *All ranks*, if the item table is sharded or its gradient is reduced early. Adds what
    /// [`backward_from`] returned for each part of a batch. `is_sized`: whether all ranks look up
    /// the same number of rows.
    fn add_gradients(
        &mut self,
        of_parts: &[Vec<Tensor>],
        lookups: &[Lookup<'_>],
        is_sized: bool,
        hooks: &mut dyn GradientHooks,
    ) -> Result<(), CollectiveError> {
        let others = self.other_parameters();
        tch::no_grad(|| {
            for of_part in of_parts {
                // Parameters that the pass did not use have no gradient.
                let used = others.clone().zip(of_part).filter(|(_, gradient)| gradient.defined());
                let (sums, terms): (Vec<_>, Vec<_>) =
                    used.map(|(index, gradient)| (self.gradients.of(index), gradient)).unzip();
                add_all(&sums, &terms);
            }
            for (lookup, number) in lookups.iter().zip(others.len()..) {
                let gradient = join_parts(of_parts.iter().map(|of_part| &of_part[number]));
                if let Some(list) = self.gradients.list_of(lookup.table) {
                    list.add(&lookup.rows, &gradient);
                    continue;
                }
                // The vector of the padding row is read, but not learnt.
                let mut gradient = gradient;
                let _ = gradient.masked_fill_(&lookup.rows.eq(0).unsqueeze(1), 0.0);
                if lookup.table == ITEM_TABLE
                    && self.add_late_rows(&lookup.rows, &gradient, is_sized, hooks)?
                {
                    continue;
                }
                let mut of_table = self.gradients.of(lookup.table);
                let is_reproducible = self.item_table.is_reproducible();
                lookup.request.scatter_gradients(
                    &self.item_table,
                    &gradient,
                    |rows, gradient| {
                        add_rows(&mut of_table, rows, gradient, is_reproducible);
                        hooks.shard_updated(&mut self.gradients);
                    },
                )?;
            }
            Ok(())
        })
    }

    /// *All ranks*, if the gradient of the item table is reduced early. Adds gradients `[N, D]` of
    /// rows `[N]`, and those of the other ranks; returns whether it did.
    fn add_late_rows(
        &mut self,
        rows: &Tensor,
        gradients: &Tensor,
        is_sized: bool,
        hooks: &mut dyn GradientHooks,
    ) -> Result<bool, CollectiveError> {
        let Some((rows, gradients)) = hooks.gather_late_rows(rows, gradients, is_sized)? else {
            return Ok(false);
        };
        add_rows_deterministically(&mut self.gradients.of(ITEM_TABLE), &rows, &gradients);
        Ok(true)
    }

    /// *All ranks*, if the item table is sharded. The output states of `plan` over `batch`,
    /// without dropout or autograd: `[N, D]`.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn read(&self, batch: &Batch, plan: Plan) -> Result<Tensor, CollectiveError> {
        self.encode_planned(batch, plan, None).map(|(states, _)| states)
    }

    /// *All ranks*, if the item table is sharded. [`Network::read`], and the candidates that
    /// `search` finds.
    fn encode_planned(
        &self,
        batch: &Batch,
        plan: Plan,
        mut search: Option<CandidateSearch>,
    ) -> Result<(Tensor, Option<Candidates>), CollectiveError> {
        let mut columns = batch.columns_with_padding();
        let mut sessions = self.preparer().sessions(plan, batch, false, None);
        let mut tensors: Vec<&mut Tensor> = columns.iter_mut().collect();
        tensors.extend(sessions.tensors_mut());
        tensors.extend(search.iter_mut().flat_map(CandidateSearch::tensors_mut));
        send_together(tensors, self.device());
        tch::no_grad(|| {
            let evidence = self.evidence.as_ref().zip(search);
            let candidates =
                evidence.map(|(evidence, search)| evidence.index.find(&search, &columns));
            let items = self.items(None);
            let lookups = self.encoder.input.look_up(&items, &columns, &self.item_table, false)?;
            let input = EncoderInput::whole(columns, &lookups);
            Ok((self.encoder.states(&self.parameters, &input, &sessions, None), candidates))
        })
    }

    /// Scores `[B, V]` of the next items of sessions in padded columns `[B, width]`, of
    /// `lengths: [B]`. The arithmetic is that of [`Recommender::encode`] and
    /// [`Recommender::scores`]; no operation depends on the number of sessions, so that it can be
    /// traced. The item table must be replicated.
    pub fn next_scores(&self, columns: &[Tensor], lengths: &Tensor, width: i64) -> Tensor {
        tch::no_grad(|| {
            let (encoder, parameters) = (&self.encoder, &self.parameters);
            let columns: Vec<Tensor> =
                columns.iter().map(|column| column.reshape([-1]).constant_pad_nd([0, 1])).collect();
            let items = self.items(None);
            let lookups = encoder.input.look_up(&items, &columns, &self.item_table, false);
            let lookups = lookups.expect("lookups in a replicated table make no collective call");
            let input = EncoderInput::whole(columns, &lookups);
            let states = encoder.next_states(parameters, &input, &self.objective, lengths, width);
            let vectors = encoder.vectors(parameters, &states);
            let sparse = self.evidence.as_ref().map(|Evidence { index, scorer }| {
                let candidates = index.of_padded(&input.columns, lengths, width);
                scorer.scores(parameters, &candidates, &states)
            });
            self.scores(&Encoded { vectors, sparse }, 0..self.item_table.n_items)
        })
    }

    /// Largest number of events of a session that the exported model reads.
    pub fn served_length(&self, max_length: usize) -> usize {
        // A model that attends to padding reads sessions of exactly one length, mask included.
        self.encoder.padded_length.map_or(max_length, |length| {
            length - usize::from(self.objective.masks(self.encoder.attends()))
        })
    }

    /// Turns all parameters into constants, tables of vectors in type `kind`, which are most of a
    /// model's size. Items are then scored in that type; the other parameters stay f32.
    pub fn serve_with_tables_in(&mut self, kind: Kind) {
        if let Some(evidence) = &self.evidence {
            evidence.index.prepare_trace();
        }
        let leaf = |index: usize| self.parameters.leaf(index).detach();
        let (vectors, bias) = self.items(None).of_range(0, leaf(ITEM_TABLE), leaf(ITEM_BIAS));
        self.parameters.replace(ITEM_TABLE, &vectors);
        self.parameters.replace(ITEM_BIAS, &bias);
        self.composition = Composition::default();
        for index in 0..self.parameters.views().len() {
            let is_table = index < self.n_tables && index != ITEM_BIAS;
            self.parameters.freeze(index, if is_table { kind } else { Kind::Float });
        }
    }
}

impl Recommender for Network<'_> {
    fn n_items(&self) -> i64 {
        self.item_table.n_items
    }

    fn device(&self) -> Device {
        self.parameters.values().device()
    }

    fn scores_are_logits(&self) -> bool {
        true
    }

    fn encode(&self, known: &Batch) -> Result<Encoded, CollectiveError> {
        let plan = self.objective.next(&known.lengths, self.encoder.attends());
        let evidence = self.evidence.as_ref();
        let search = evidence.map(|evidence| evidence.index.preparer().of_next(known));
        let (states, candidates) = self.encode_planned(known, plan, search)?;
        Ok(tch::no_grad(|| {
            let vectors = self.encoder.vectors(&self.parameters, &states);
            let sparse = evidence.zip(candidates).map(|(Evidence { scorer, .. }, candidates)| {
                scorer.scores(&self.parameters, &candidates, &states)
            });
            Encoded { vectors, sparse }
        }))
    }

    fn scores(&self, encoded: &Encoded, items: Range<i64>) -> Tensor {
        let dense = self.dense_scores(&encoded.vectors, &items);
        if let Some(sparse) = &encoded.sparse {
            tch::no_grad(|| sparse.write_to(&dense, None, &items));
        }
        dense
    }
}

impl Network<'_> {
    /// Scores `[B, C]` of `items` from `vectors: [B, D]` alone.
    fn dense_scores(&self, vectors: &Tensor, items: &Range<i64>) -> Tensor {
        tch::no_grad(|| {
            let first = items.start - self.item_table.rows.start;
            let rows = |index: usize| {
                self.parameters.leaf(index).narrow(0, first, items.end - items.start)
            };
            let (table, bias) =
                self.items(None).of_range(first, rows(self.scored_table), rows(ITEM_BIAS));
            if table.kind() == Kind::Float {
                return bias.addmm(vectors, &table.tr());
            }
            vectors.to_kind(table.kind()).matmul(&table.tr()).to_kind(Kind::Float) + bias
        })
    }
}
