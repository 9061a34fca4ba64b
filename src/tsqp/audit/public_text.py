"""English that anybody could have: the audit's attacker runs it through the public model to train on.

It is about everyday things, and so is the built-in prompt: the report says how many of the prompt's tokens occur here.
"""

PUBLIC_TEXT = """\
The weather was mild when we left the house, and by noon the sun had come out over the hills. My brother drove, I read
the map, and the children slept in the back of the car. At the station we bought two tickets, a newspaper and a cup of
coffee. The train was late again. A woman next to us said that she had been waiting for more than an hour and that
nobody had told her why. "It is always the same on Monday," she said, "but what can you do?"

Thank you for your letter of 12 March. We are sorry to hear that the order did not arrive on time. Please let us know
whether you would like a refund or a new delivery; in either case there is no charge. If you have any questions, call
us at the number above or write to the address below. Your account number is 20583 and the amount due is 149.90
dollars. Payment is possible by card, by bank transfer or in cash. Kind regards, Anna Miller, customer service.

To make the soup, cut one onion and three carrots into small pieces and cook them in a little oil for five minutes.
Add a litre of water, some salt, pepper and two potatoes. Let it boil, then turn down the heat and wait for about half
an hour. Taste it, add the herbs, and serve it with bread and butter. It keeps in the refrigerator for up to three
days.

The city council voted on Thursday to close the old bridge. Engineers had warned for years that the structure is not
safe for heavy trucks. The mayor said the work would take 18 months and cost around 6.5 million, most of which will be
paid by the state. Shop owners on the north side are worried; they fear that fewer people will come into the centre. A
new bus line should help, according to the report, which was published online this week.

How do I reset my password? Open the settings, choose "Security" and click on the link. You will get an email with a
code. Enter the code, then type the new password twice. It should have at least ten characters, with letters, numbers
and one special sign. Do not share it with anyone, not even with your family. If the message does not appear, check
the spam folder or try again later. Who can see my data? Only you and the people you choose. We never sell it.

She studied biology at the university and worked in a hospital for six years before she opened her own practice. Her
patients like her because she listens. "First I ask them how they sleep," the doctor said, "and only then what hurts."
Most of them come with small things: a cold, a cut, back pain, high blood pressure. Some need a test, a scan or
medicine; a few have to see a specialist, which can take weeks. The results are sent to their home, or they can call
the nurse.

In mathematics, a group is a set with an operation that is associative, has an identity and an inverse for every
element. The integers form a group under addition. In computer science, a list is a sequence of values; you can add to
it, remove from it, and search it. The function below returns the sum of all even numbers: def total(xs): return sum(x
for x in xs if x % 2 == 0). It runs in linear time. If the input is empty, the result is 0.

"When will you be back?" his mother asked. "On Friday night, I think, or on Saturday if there is too much snow." He
took his coat, kissed her and went out. The street was dark and quiet. He thought about his daughter, who had called
the day before and told him about school, and about his wife, who had not said a word. Why had she been so cold? He
should have asked. There was still time, he told himself, to write to her and say what he felt.

The contract starts on 1 July 2021 and ends after two years. Either party may cancel it in writing with a notice of
three months. The rent is 780 euros per month, plus heating and water. The tenant must not keep large animals and has
to tell the owner about any damage at once. All keys must be given back on the last day under the terms named in
section 4.
"""
